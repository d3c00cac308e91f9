/* The part of CANN's runtime that torch-npu asks for, with the host's memory for the device's: the
   eight devices of a node, streams that do at once what they are told, events that are always over. */
#include <malloc.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>

#include "acl/acl.h"
#include "acl/acl_op_compiler.h"
#include "late.h"

#define OK ACL_SUCCESS

static _Thread_local int32_t device = 0;

aclError aclInit(const char *path) { return OK; }
const char *aclrtGetSocName(void) { return "Ascend910B3"; }
aclError aclrtGetDeviceCount(uint32_t *count) { *count = 8; return OK; }
aclError aclrtSetDevice(int32_t chosen) { device = chosen; return OK; }
aclError aclrtGetDevice(int32_t *chosen) { *chosen = device; return OK; }
aclError aclrtGetCurrentContext(aclrtContext *c) { *c = (void *)(intptr_t)(device + 1); return OK; }
aclError aclrtSetCurrentContext(aclrtContext c) { if (c) device = (int32_t)(intptr_t)c - 1; return OK; }
aclError aclrtSetDeviceSatMode(aclrtFloatOverflowMode mode) { return OK; }
aclError aclrtSetOpWaitTimeout(uint32_t seconds) { return OK; }
aclError aclrtSetOpExecuteTimeOut(uint32_t seconds) { return OK; }

static int64_t options[64];
aclError aclrtSetSysParamOpt(aclSysParamOpt o, int64_t value) { options[o & 63] = value; return OK; }
aclError aclrtGetSysParamOpt(aclSysParamOpt o, int64_t *value) { *value = options[o & 63]; return OK; }
aclError aclrtCtxSetSysParamOpt(aclSysParamOpt o, int64_t value) { options[o & 63] = value; return OK; }
aclError aclrtCtxGetSysParamOpt(aclSysParamOpt o, int64_t *value) { *value = options[o & 63]; return OK; }
aclError aclSetCompileopt(aclCompileOpt option, const char *value) { return OK; }
aclError aclGetCompileopt(aclCompileOpt option, char *value, size_t size) { if (size) *value = 0; return OK; }
size_t aclGetCompileoptSize(aclCompileOpt option) { return 1; }

aclError aclrtGetMemInfo(aclrtMemAttr attribute, size_t *unused, size_t *all) {
    *unused = *all = (size_t)64 << 30;
    return OK;
}
static aclError take(void **place, size_t size) {
    return posix_memalign(place, 512, size ? size : 1) ? ACL_ERROR_RT_MEMORY_ALLOCATION : OK;
}
aclError aclrtMalloc(void **p, size_t size, aclrtMemMallocPolicy policy) { return take(p, size); }
aclError aclrtMallocAlign32(void **p, size_t size, aclrtMemMallocPolicy policy) { return take(p, size); }
aclError aclrtMallocHost(void **p, size_t size) { return take(p, size); }
/* Whoever reads what has been freed reads no numbers. */
aclError aclrtFree(void *p) {
    size_t size = malloc_usable_size(p);
    late_forget(p, size);
    memset(p, 0xff, size);
    free(p);
    return OK;
}
aclError aclrtFreeHost(void *p) { free(p); return OK; }
aclError aclrtMemcpy(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind) {
    memmove(to, from, size);
    return OK;
}
aclError aclrtMemcpyAsync(void *to, size_t room, const void *from, size_t size, aclrtMemcpyKind kind, aclrtStream stream) {
    memmove(to, from, size);
    return OK;
}
aclError aclrtMemset(void *to, size_t room, int32_t value, size_t size) { memset(to, value, size); return OK; }
aclError aclrtMemsetAsync(void *to, size_t room, int32_t value, size_t size, aclrtStream stream) {
    memset(to, value, size);
    return OK;
}

static intptr_t handles = 1000;
static aclError handle(void **place) { *place = (void *)++handles; return OK; }
aclError aclrtCreateStream(aclrtStream *stream) { return handle(stream); }
aclError aclrtCreateStreamWithConfig(aclrtStream *s, uint32_t priority, uint32_t flag) { return handle(s); }
aclError aclrtDestroyStreamForce(aclrtStream stream) { return OK; }
aclError aclrtSetStreamFailureMode(aclrtStream stream, uint64_t mode) { return OK; }
aclError aclrtStreamQuery(aclrtStream stream, aclrtStreamStatus *status) {
    *status = ACL_STREAM_STATUS_COMPLETE;
    return OK;
}
aclError aclrtCreateEventWithFlag(aclrtEvent *event, uint32_t flag) { return handle(event); }
aclError aclrtCreateEventExWithFlag(aclrtEvent *event, uint32_t flag) { return handle(event); }
aclError aclrtQueryEventStatus(aclrtEvent event, aclrtEventRecordedStatus *status) {
    *status = ACL_EVENT_RECORDED_STATUS_COMPLETE;
    return OK;
}
aclError aclrtQueryEventWaitStatus(aclrtEvent event, aclrtEventWaitStatus *status) {
    *status = ACL_EVENT_WAIT_STATUS_COMPLETE;
    return OK;
}
aclError aclrtEventElapsedTime(float *milliseconds, aclrtEvent from, aclrtEvent to) { *milliseconds = 0; return OK; }

/* Operators that torch-npu's own C++ starts past the dispatcher, where no reference can stand for
   them. A barrier makes a tensor of ones, which nobody reads; anything else must not pass. */
aclError aclopCompileAndExecute(
    const char *name, int inputs, const aclTensorDesc *const input_descriptions[],
    const aclDataBuffer *const input_data[], int outputs,
    const aclTensorDesc *const output_descriptions[], aclDataBuffer *const output_data[],
    const aclopAttr *attributes, aclopEngineType engine, aclopCompileType compile,
    const char *path, aclrtStream stream) {
    if (!strcmp(name, "OnesLike")) return OK;
    fprintf(stderr, "stand-in for CANN: there is no operator %s\n", name);
    return ACL_ERROR_OP_NOT_FOUND;
}

// HCCL's collectives between the processes of one machine, through a shared file: every rank
// writes what it has into its slot, all meet, every rank reads what it wants, all meet again. What it
// has read arrives late (late.cpp).
#include <algorithm>
#include <atomic>
#include <cstdint>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <fcntl.h>
#include <sched.h>
#include <sys/mman.h>
#include <unistd.h>
#include <vector>
#include "acl/acl.h"
#include "hccl/hccl.h"
#include "late.h"

namespace {
constexpr size_t SLOT = size_t(1) << 28, TABLE = 4096;  // bytes; pages untouched take no room

struct Shared { std::atomic<uint32_t> arrived, round; };

struct Comm {
    uint32_t ranks, rank;
    char *base;
    Shared *shared() { return reinterpret_cast<Shared *>(base); }
    // Of a rank: where in its slot the rows for each other rank begin, in bytes; then the slot.
    uint64_t *table(uint32_t r) { return reinterpret_cast<uint64_t *>(base + TABLE + r * (SLOT + TABLE)); }
    char *slot(uint32_t r) { return reinterpret_cast<char *>(table(r)) + TABLE; }
    void meet() {
        uint32_t now = shared()->round.load();
        if (shared()->arrived.fetch_add(1) + 1 == ranks) {
            shared()->arrived.store(0);
            shared()->round.fetch_add(1);
        } else {
            while (shared()->round.load() == now) sched_yield();
        }
    }
    void put(const void *from, size_t bytes) {
        if (bytes > SLOT) {
            fprintf(stderr, "stand-in for HCCL: %zu bytes in one message\n", bytes);
            abort();
        }
        memcpy(slot(rank), from, bytes);
        meet();
    }
};

size_t width(HcclDataType t) {
    switch (t) {
    case HCCL_DATA_TYPE_INT8: case HCCL_DATA_TYPE_UINT8: return 1;
    case HCCL_DATA_TYPE_INT16: case HCCL_DATA_TYPE_UINT16: case HCCL_DATA_TYPE_FP16: case HCCL_DATA_TYPE_BFP16: return 2;
    case HCCL_DATA_TYPE_INT64: case HCCL_DATA_TYPE_UINT64: case HCCL_DATA_TYPE_FP64: return 8;
    default: return 4;
    }
}

struct BFloat {
    uint16_t bits;
    operator float() const { uint32_t x = uint32_t(bits) << 16; float f; memcpy(&f, &x, 4); return f; }
    BFloat &operator=(float f) {
        uint32_t x; memcpy(&x, &f, 4);
        bits = uint16_t((x + 0x7fff + ((x >> 16) & 1)) >> 16);
        return *this;
    }
};

template <typename T> void reduce_as(Comm *c, void *out, size_t first, size_t count, HcclReduceOp op) {
    for (size_t i = 0; i < count; ++i) {
        auto value = +reinterpret_cast<T *>(c->slot(0))[first + i];
        for (uint32_t r = 1; r < c->ranks; ++r) {
            auto next = +reinterpret_cast<T *>(c->slot(r))[first + i];
            switch (op) {
            case HCCL_REDUCE_SUM: value += next; break;
            case HCCL_REDUCE_PROD: value *= next; break;
            case HCCL_REDUCE_MAX: value = next > value ? next : value; break;
            default: value = next < value ? next : value;
            }
        }
        reinterpret_cast<T *>(out)[i] = value;
    }
}

void reduce_to(Comm *c, void *out, size_t first, size_t count, HcclDataType t, HcclReduceOp op) {
    switch (t) {
    case HCCL_DATA_TYPE_FP32: return reduce_as<float>(c, out, first, count, op);
    case HCCL_DATA_TYPE_FP64: return reduce_as<double>(c, out, first, count, op);
    case HCCL_DATA_TYPE_BFP16: return reduce_as<BFloat>(c, out, first, count, op);
    case HCCL_DATA_TYPE_INT32: return reduce_as<int32_t>(c, out, first, count, op);
    case HCCL_DATA_TYPE_INT64: return reduce_as<int64_t>(c, out, first, count, op);
    case HCCL_DATA_TYPE_UINT8: return reduce_as<uint8_t>(c, out, first, count, op);
    case HCCL_DATA_TYPE_INT8: return reduce_as<int8_t>(c, out, first, count, op);
    default: fprintf(stderr, "stand-in for HCCL: no reduction of type %d\n", t); abort();
    }
}
void reduce(Comm *c, aclrtStream stream, void *out, size_t first, size_t count, HcclDataType t, HcclReduceOp op) {
    std::vector<char> sums(count * width(t));
    reduce_to(c, sums.data(), first, count, t, op);
    late_arrive(stream, out, sums.data(), sums.size());
}
Comm *of(HcclComm c) { return static_cast<Comm *>(c); }
}  // namespace

extern "C" {
HcclResult HcclGetRootInfo(HcclRootInfo *info) {
    char path[] = "/dev/shm/hccl-XXXXXX";
    int file = mkstemp(path);
    if (file < 0) return HCCL_E_OPEN_FILE_FAILURE;
    close(file);
    snprintf(info->internal, sizeof(path), "%s", path);
    return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfo(uint32_t n, const HcclRootInfo *info, uint32_t rank, HcclComm *comm) {
    size_t bytes = TABLE + n * (SLOT + TABLE);
    int file = open(info->internal, O_RDWR);
    if (file < 0 || ftruncate(file, bytes)) return HCCL_E_OPEN_FILE_FAILURE;
    void *base = mmap(nullptr, bytes, PROT_READ | PROT_WRITE, MAP_SHARED, file, 0);
    close(file);
    Comm *c = new Comm{n, rank, static_cast<char *>(base)};
    c->meet();
    if (rank == 0) unlink(info->internal);
    *comm = c;
    return HCCL_SUCCESS;
}
HcclResult HcclCommInitRootInfoConfig(uint32_t n, const HcclRootInfo *i, uint32_t r, const HcclCommConfig *, HcclComm *c) { return HcclCommInitRootInfo(n, i, r, c); }
HcclResult HcclCommDestroy(HcclComm c) { return HCCL_SUCCESS; }
HcclResult HcclGetCommName(HcclComm c, char *name) { snprintf(name, 128, "standin"); return HCCL_SUCCESS; }
HcclResult HcclGetCommAsyncError(HcclComm, HcclResult *e) { *e = HCCL_SUCCESS; return HCCL_SUCCESS; }
HcclResult HcclGetRankSize(HcclComm c, uint32_t *n) { *n = of(c)->ranks; return HCCL_SUCCESS; }
HcclResult HcclGetRankId(HcclComm c, uint32_t *r) { *r = of(c)->rank; return HCCL_SUCCESS; }
HcclResult HcclBarrier(HcclComm c, aclrtStream) { of(c)->meet(); return HCCL_SUCCESS; }
HcclResult HcclAllReduce(void *in, void *out, uint64_t n, HcclDataType t, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    c->put(in, n * width(t));
    reduce(c, stream, out, 0, n, t, op);
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclReduce(void *in, void *out, uint64_t n, HcclDataType t, HcclReduceOp op, uint32_t root, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    c->put(in, n * width(t));
    if (c->rank == root) reduce(c, stream, out, 0, n, t, op);
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclReduceScatter(void *in, void *out, uint64_t n, HcclDataType t, HcclReduceOp op, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    c->put(in, c->ranks * n * width(t));
    reduce(c, stream, out, c->rank * n, n, t, op);
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclBroadcast(void *buffer, uint64_t n, HcclDataType t, uint32_t root, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    c->put(buffer, n * width(t));
    late_arrive(stream, buffer, c->slot(root), n * width(t));
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclScatter(void *in, void *out, uint64_t n, HcclDataType t, uint32_t root, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    size_t part = n * width(t);
    c->put(c->rank == root ? in : out, c->rank == root ? c->ranks * part : 0);
    late_arrive(stream, out, c->slot(root) + c->rank * part, part);
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclAllGather(void *in, void *out, uint64_t n, HcclDataType t, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    size_t part = n * width(t);
    c->put(in, part);
    for (uint32_t r = 0; r < c->ranks; ++r) late_arrive(stream, static_cast<char *>(out) + r * part, c->slot(r), part);
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclAlltoAllV(const void *in, const void *sc, const void *sd, HcclDataType t, const void *out, const void *rc, const void *rd, HcclDataType, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    auto counts = static_cast<const uint64_t *>(sc), starts = static_cast<const uint64_t *>(sd);
    auto wanted = static_cast<const uint64_t *>(rc), places = static_cast<const uint64_t *>(rd);
    size_t w = width(t), bytes = 0;
    for (uint32_t r = 0; r < c->ranks; ++r) {
        c->table(c->rank)[r] = starts[r] * w;
        if (counts[r]) bytes = std::max(bytes, size_t((starts[r] + counts[r]) * w));
    }
    c->put(in, bytes);
    for (uint32_t r = 0; r < c->ranks; ++r)
        late_arrive(stream, static_cast<char *>(const_cast<void *>(out)) + places[r] * w, c->slot(r) + c->table(r)[c->rank], wanted[r] * w);
    c->meet();
    return HCCL_SUCCESS;
}
HcclResult HcclAlltoAll(const void *in, uint64_t n, HcclDataType t, const void *out, uint64_t m, HcclDataType, HcclComm comm, aclrtStream stream) {
    late_begin(stream);
    Comm *c = of(comm);
    size_t part = n * width(t);
    c->put(in, c->ranks * part);
    for (uint32_t r = 0; r < c->ranks; ++r)
        late_arrive(stream, static_cast<char *>(const_cast<void *>(out)) + r * part, c->slot(r) + c->rank * part, part);
    c->meet();
    return HCCL_SUCCESS;
}
}

// Of late.cpp, for the other stand-ins.
#include <stddef.h>
#ifdef __cplusplus
extern "C" {
#endif
void late_begin(void *stream);  // a message, which those before it on its stream are over for
void late_arrive(void *stream, void *place, const void *bytes, size_t size);
void late_forget(void *place, size_t size);  // memory that is freed: nothing arrives there
#ifdef __cplusplus
}
#endif

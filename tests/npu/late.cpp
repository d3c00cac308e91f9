// What a message brings is late, as a device's may be: it is there once somebody waits for an event
// that was recorded behind it, and until then its place holds no numbers. Streams keep their order.
#include <cstdint>
#include <cstring>
#include <deque>
#include <mutex>
#include <unordered_map>
#include <utility>
#include <vector>
#include "acl/acl.h"
#include "late.h"

namespace {
struct Arrival { char *place; std::vector<char> bytes; };
struct Stream { std::deque<Arrival> coming; uint64_t over = 0; };

std::mutex lock;
std::unordered_map<void *, Stream> streams;
std::unordered_map<void *, std::pair<void *, uint64_t>> events;  // of which stream, behind how many

void catch_up(Stream &stream, uint64_t asked) {
    while (stream.over < asked) {
        Arrival &next = stream.coming.front();
        if (next.place) memcpy(next.place, next.bytes.data(), next.bytes.size());
        stream.coming.pop_front();
        stream.over++;
    }
}
void wait_for(void *event) {
    std::lock_guard<std::mutex> held(lock);
    auto found = events.find(event);
    if (found != events.end()) catch_up(streams[found->second.first], found->second.second);
}
void finish(Stream &stream) { catch_up(stream, stream.over + stream.coming.size()); }
}  // namespace

extern "C" {
void late_begin(void *stream) {
    std::lock_guard<std::mutex> held(lock);
    finish(streams[stream]);
}
void late_arrive(void *stream, void *place, const void *bytes, size_t size) {
    std::lock_guard<std::mutex> held(lock);
    auto from = static_cast<const char *>(bytes);
    streams[stream].coming.push_back({static_cast<char *>(place), {from, from + size}});
    memset(place, 0xff, size);
}
void late_forget(void *place, size_t size) {
    std::lock_guard<std::mutex> held(lock);
    auto first = static_cast<char *>(place);
    for (auto &each : streams)
        for (auto &arrival : each.second.coming)
            if (arrival.place >= first && arrival.place < first + size) arrival.place = nullptr;
}
aclError aclrtRecordEvent(aclrtEvent event, aclrtStream stream) {
    std::lock_guard<std::mutex> held(lock);
    Stream &of = streams[stream];
    events[event] = {stream, of.over + of.coming.size()};
    return ACL_SUCCESS;
}
aclError aclrtDestroyEvent(aclrtEvent event) {
    std::lock_guard<std::mutex> held(lock);
    events.erase(event);
    return ACL_SUCCESS;
}
aclError aclrtStreamWaitEvent(aclrtStream, aclrtEvent event) { wait_for(event); return ACL_SUCCESS; }
aclError aclrtSynchronizeEvent(aclrtEvent event) { wait_for(event); return ACL_SUCCESS; }
aclError aclrtSynchronizeStream(aclrtStream stream) { late_begin(stream); return ACL_SUCCESS; }
aclError aclrtSynchronizeStreamWithTimeout(aclrtStream stream, int32_t) { return aclrtSynchronizeStream(stream); }
aclError aclrtSynchronizeDevice(void) {
    std::lock_guard<std::mutex> held(lock);
    for (auto &each : streams) finish(each.second);
    return ACL_SUCCESS;
}
aclError aclrtSynchronizeDeviceWithTimeout(int32_t) { return aclrtSynchronizeDevice(); }
}

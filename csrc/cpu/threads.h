// Work sharing on the threads that torch already has. For the files compiled once.
#pragma once

#include <cstdint>

namespace memos_engine {

// Calls body(context, item) for items 0 ... count - 1, in any order, on up to `threads` threads.
void parallel_items(int64_t count, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel(int64_t count, int threads, const Body& body) {
    parallel_items(
        count, threads, [](void* context, int64_t item) { (*(const Body*)context)(item); }, (void*)&body);
}

// This thread's scratch, 64-byte aligned, kept until the thread ends; its contents are arbitrary.
void* thread_scratch(int64_t bytes);

}  // namespace memos_engine

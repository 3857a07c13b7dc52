#include "threads.h"

#include <dlfcn.h>

#include <atomic>
#include <cstdlib>
#include <new>
#include <thread>
#include <vector>

namespace memos_engine {
namespace {

struct Job {
    std::atomic<int64_t> next{0};
    int64_t count;
    void (*body)(void*, int64_t);
    void* context;
};

// Threads draw items until none is left, so that uneven items still end together.
void draw(void* data) {
    Job& job = *(Job*)data;
    for (int64_t item; (item = job.next.fetch_add(1, std::memory_order_relaxed)) < job.count;)
        job.body(job.context, item);
}

using GompParallel = void (*)(void (*)(void*), void*, unsigned, unsigned);

// torch loads its OpenMP runtime with global symbols; LLVM's runtime has the same entry. Sharing it keeps one
// thread pool in the process: a second one would fight torch's spinning threads for the cores.
GompParallel shared_pool() {
    static const GompParallel found = (GompParallel)dlsym(RTLD_DEFAULT, "GOMP_parallel");
    return found;
}

struct Scratch {
    void* data = nullptr;
    int64_t size = 0;
    ~Scratch() { std::free(data); }
};

}  // namespace

void parallel_items(int64_t count, int threads, void (*body)(void*, int64_t), void* context) {
    Job job;
    job.count = count, job.body = body, job.context = context;
    if (threads > count) threads = (int)count;
    if (threads <= 1) {
        draw(&job);
    } else if (const GompParallel pool = shared_pool()) {
        pool(draw, &job, (unsigned)threads, 0);
    } else {
        std::vector<std::thread> helpers;
        for (int i = 1; i < threads; ++i) helpers.emplace_back(draw, &job);
        draw(&job);
        for (std::thread& helper : helpers) helper.join();
    }
}

void* thread_scratch(int64_t bytes) {
    thread_local Scratch scratch;
    if (scratch.size < bytes) {
        const int64_t size = (bytes + 4095) / 4096 * 4096;
        std::free(scratch.data);
        scratch.size = 0;
        scratch.data = std::aligned_alloc(64, size);
        if (!scratch.data) std::abort();  // an exception must not cross the OpenMP runtime
        scratch.size = size;
    }
    return scratch.data;
}

}  // namespace memos_engine

#include "threads.h"

#include <dlfcn.h>
#include <sched.h>

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

using OmpCount = int (*)();

OmpCount omp_count() {
    static const OmpCount found = (OmpCount)dlsym(RTLD_DEFAULT, "omp_get_num_threads");
    return found;
}

void pause() {
#if defined(__x86_64__)
    __builtin_ia32_pause();
#endif
}

template <class F>
void spin(const F& until) {
    constexpr int kSpins = 4000;  // about ten microseconds; longer waits mean that a core is taken
    for (int spin = 0; !until(); ++spin) {
        if (spin >= kSpins)
            sched_yield();
        else
            pause();
    }
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

void Team::barrier() {
    if (size_ <= 1) return;
    const int round = round_.load(std::memory_order_acquire);
    if (arrived_.fetch_add(1, std::memory_order_acq_rel) + 1 == size_) {
        arrived_.store(0, std::memory_order_relaxed);
        round_.store(round + 1, std::memory_order_release);
        return;
    }
    spin([&] { return round_.load(std::memory_order_acquire) != round; });
}

void Team::await(const std::atomic<int64_t>& done, int64_t count) {
    spin([&] { return done.load(std::memory_order_acquire) >= count; });
}

void parallel_team(Team& team, int threads, void (*body)(void*, Team&, int), void* context) {
    struct Run {
        Team& team;
        void (*body)(void*, Team&, int);
        void* context;
        std::atomic<int> arrived{0};
        std::atomic<bool> started{false};
    } run{team, body, context};
    const GompParallel pool = shared_pool();
    const OmpCount count = omp_count();
    if (threads <= 1 || (pool && !count)) {
        team.start(1);
        body(context, team, 0);
    } else if (pool) {
        // The runtime may lend fewer threads than asked for: a barrier must know how many.
        pool(
            [](void* data) {
                Run& r = *(Run*)data;
                const int thread = r.arrived.fetch_add(1);
                if (thread == 0) {
                    r.team.start(omp_count()());
                    r.started.store(true, std::memory_order_release);
                }
                while (!r.started.load(std::memory_order_acquire)) pause();
                r.body(r.context, r.team, thread);
            },
            &run, (unsigned)threads, 0);
    } else {
        team.start(threads);
        std::vector<std::thread> helpers;
        for (int i = 1; i < threads; ++i) helpers.emplace_back([&, i] { body(context, team, i); });
        body(context, team, 0);
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

// Work sharing on the threads that torch already has. For the files compiled once.
#pragma once

#include <atomic>
#include <cstddef>
#include <cstdint>
#include <vector>

namespace memos_engine {

// Calls body(context, item) for items 0 ... count - 1, in any order, on up to `threads` threads.
void parallel_items(int64_t count, int threads, void (*body)(void*, int64_t), void* context);

template <class Body>
void parallel(int64_t count, int threads, const Body& body) {
    parallel_items(
        count, threads, [](void* context, int64_t item) { (*(const Body*)context)(item); }, (void*)&body);
}

// Threads that go through the same stages side by side.
class Team {
  public:
    Team(int64_t stages, int most) : most_(most), counters_((std::size_t)(stages * most)) {}

    // Calls f(item) for items 0 ... count - 1 of a stage, each on one thread, and returns when all are done.
    // Every thread calls it for the same stages in the same order. A thread begins with a range of its own,
    // in order, as prefetchers like it, and then helps the others with theirs.
    template <class F>
    void stage(int64_t index, int64_t count, int thread, const F& f) {
        share(index, count, thread, f);
        barrier();
    }

    // A stage whose end nobody waits for: when it returns, every item is done or another thread is at it.
    template <class F>
    void share(int64_t index, int64_t count, int thread, const F& f) {
        for (int i = 0; i < size_; ++i) {
            const int owner = (thread + i) % size_;
            const int64_t begin = owner * count / size_, end = (owner + 1) * count / size_;
            std::atomic<int64_t>& next = counters_[(std::size_t)(index * most_ + owner)].next;
            for (int64_t item; (item = begin + next.fetch_add(1, std::memory_order_relaxed)) < end;) f(item);
        }
    }

    // Waits until `done` has reached `count`; what was written before it was raised is seen.
    static void await(const std::atomic<int64_t>& done, int64_t count);

    void barrier();
    void start(int size) { size_ = size < most_ ? size : most_; }
    int size() const { return size_; }

  private:
    struct alignas(64) Counter {
        std::atomic<int64_t> next{0};
    };
    int most_, size_ = 1;
    std::vector<Counter> counters_;
    alignas(64) std::atomic<int> arrived_{0};
    alignas(64) std::atomic<int> round_{0};
};

// Calls body(context, team, thread) on up to `threads` threads at once, numbered from 0; `team`, made for at
// least as many, then knows how many there are.
void parallel_team(Team& team, int threads, void (*body)(void*, Team&, int), void* context);

// This thread's scratch, 64-byte aligned, kept until the thread ends; its contents are arbitrary.
void* thread_scratch(int64_t bytes);

}  // namespace memos_engine

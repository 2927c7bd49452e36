// SPDX-License-Identifier: Apache-2.0
// Tasks for the threads of torch. Each has neighbouring ones of its own, so that what one op leaves in a thread's cache
// is where the next op looks for it, and then takes what others have left: processors are not equally fast, nor always
// at hand.
#pragma once
#include <ATen/Parallel.h>

#include <algorithm>
#include <atomic>
#include <cstdint>
#include <memory>
#include <vector>

namespace fastnas {

class Tasks {
 public:
  Tasks(int64_t tasks, int64_t grain, int64_t threads)
      : tasks_(tasks), shares_(threads), chunk_(std::max(grain, tasks / (threads * kChunks))) {
    for (int64_t i = 0; i < threads; ++i) shares_[i].next = first(i);
  }

  // What one thread goes through: while (worker.next(task)) ...
  class Worker {
   public:
    Worker(Tasks& tasks, int64_t share) : tasks_(tasks), share_(share) {}

    bool next(int64_t& task) {
      if (at_ == end_ && !tasks_.take(share_, at_, end_)) return false;
      task = at_++;
      return true;
    }

   private:
    Tasks& tasks_;
    int64_t share_, at_ = 0, end_ = 0;
  };

 private:
  static constexpr int64_t kChunks = 16;  // that a share is taken in, if they are not too small

  struct alignas(64) Share {  // a cache line each: threads write them all the time
    std::atomic<int64_t> next{0};
  };

  int64_t first(int64_t share) const {
    const int64_t threads = shares_.size();
    return share * (tasks_ / threads) + std::min(share, tasks_ % threads);
  }

  // The next tasks of a share, or of the first one after it that has any.
  bool take(int64_t& share, int64_t& begin, int64_t& end) {
    const int64_t threads = shares_.size();
    for (int64_t i = 0; i < threads; ++i, share = share + 1 < threads ? share + 1 : 0) {
      const int64_t last = first(share + 1);
      if (shares_[share].next.load(std::memory_order_relaxed) >= last) continue;
      begin = shares_[share].next.fetch_add(chunk_, std::memory_order_relaxed);
      end = std::min(begin + chunk_, last);
      if (begin < last) return true;
    }
    return false;
  }

  int64_t tasks_;
  std::vector<Share> shares_;
  int64_t chunk_;
};

// Calls f(worker) once in every thread that is worth starting for so many tasks, of which `grain` are enough work for
// one.
template <typename F>
void parallel_tasks(int64_t tasks, int64_t grain, F&& f) {
  if (tasks <= 0) return;
  const int64_t most = at::in_parallel_region() ? 1 : at::get_num_threads();
  const int64_t threads = std::min(most, (tasks + grain - 1) / grain);
  Tasks shared(tasks, grain, threads);
  at::parallel_for(0, threads, 1, [&](int64_t begin, int64_t end) {
    for (int64_t share = begin; share < end; ++share) {
      Tasks::Worker worker(shared, share);
      f(worker);
    }
  });
}

// Sums that every task has a row of, folded task by task: their order is the same for every number of threads.
class TaskSums {
 public:
  TaskSums(int64_t tasks, int64_t row)
      // Not zeroed; std::make_unique_for_overwrite is of C++20, and PyTorch 2.11 compiles as C++17.
      : tasks_(tasks), row_(row), sums_(new double[tasks * row]) {}

  // Sets the row of a task, or adds to what it has; and sets `from` back to zeros.
  template <typename A>
  void take(int64_t task, A* from, bool add) {
    double* to = sums_.get() + task * row_;
    for (int64_t i = 0; i < row_; ++i) {
      to[i] = add ? to[i] + from[i] : static_cast<double>(from[i]);
      from[i] = A{};
    }
  }

  // The sums of all tasks, each of which has been set. Once.
  const double* fold() {
    constexpr int64_t kWidth = 1024;
    double* to = sums_.get();
    parallel_tasks((row_ + kWidth - 1) / kWidth, 1, [&](Tasks::Worker& worker) {
      for (int64_t part; worker.next(part);)
        for (int64_t task = 1; task < tasks_; ++task)
          for (int64_t i = part * kWidth; i < std::min((part + 1) * kWidth, row_); ++i)
            to[i] += to[task * row_ + i];
    });
    return to;
  }

 private:
  int64_t tasks_, row_;
  std::unique_ptr<double[]> sums_;
};

}  // namespace fastnas

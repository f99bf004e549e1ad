// A CUDA device that is not there: its memory is host memory, its kernels compute nothing.
//
// What it keeps account of is what PyTorch's host code depends on: how much memory is taken (and a refusal when there
// is no more), which host memory is page-locked, how many kernels were launched, and which events have been reached.
#pragma once
#include <cstddef>
#include <cstdint>
#include <map>
#include <mutex>
#include <list>
#include <vector>

#define EXPORTED extern "C" __attribute__((visibility("default")))

namespace fake {

constexpr size_t MIB = size_t(1) << 20;
constexpr size_t DEVICE_PAGE = 2 * MIB;  // cudaMalloc gives whole pages of this size to a process
constexpr size_t HOST_PAGE = 4096;

enum class Kind { device, page_locked, registered };
struct Range { size_t size; Kind kind; };
struct Event { bool recorded = false; uint64_t after = 0; double time_s = 0; };  // after: kernels launched before it

// A copy to or from page-locked memory that the device has not come to: what it will bring, or what it must find.
struct Copy { void* host; std::vector<char> bytes; bool arrives; uint64_t after; };

struct Counts {
  uint64_t launches = 0, products = 0, copies = 0, allocations = 0, refused = 0, registrations_refused = 0, waits = 0,
           synchronizations = 0, sources_changed = 0;  // the last: host memory that was written while it was copied
};

class Device {
 public:
  static Device& get();  // never destroyed: PyTorch frees memory while the process ends

  std::recursive_mutex mutex;
  // Settings: read from the environment when the device is first used, changed with fake_cuda_set.
  size_t total, others, page_lock_limit;
  // An event is reached once this many kernels were launched after it, or when it is waited for. With
  // arithmetic, so are copies to page-locked memory: until then it holds what it held.
  long lag;
  bool arithmetic;  // results are in memory (arithmetic.py), so small reads are not replaced by "0, finite, true"
  bool registers_pages;  // two registrations may not share a page, as some drivers have it
  int major, minor, multiprocessors;

  Counts counts;
  size_t used = 0, peak = 0, page_locked = 0, page_locked_peak = 0;

  bool take(size_t size);  // false, and counted, when the device has no more
  void give_back(size_t size);
  bool lock_pages(size_t size);
  void unlock_pages(size_t size);

  void* map(size_t size, Kind kind);  // untouched pages cost nothing
  void unmap(void* start);
  void note(void* start, size_t size, Kind kind) { ranges_[uintptr_t(start)] = {size, kind}; }
  void forget(void* start) { ranges_.erase(uintptr_t(start)); }
  const Range* range_of(const void* address);
  const Range* range_at(const void* start);

  bool register_host(void* start, size_t size, bool* refused_for_limit);
  bool unregister_host(void* start);

  void launch() { std::lock_guard guard(mutex); counts.launches++; finish_copies(); }
  void copy(void* target, const void* source, size_t size, bool waits = false);  // waits: for the caller, before it returns
  void record(Event* event);
  bool reached(const Event* event);
  bool idle() const { return done_ + lag >= counts.launches; }
  void wait_for(const Event* event);
  void synchronize();

 private:
  Device();
  void finish_copies(const void* start = nullptr, size_t size = 0);  // what is over, and what lies there
  std::list<Copy> copies_;
  std::map<uintptr_t, Range> ranges_;
  std::map<uintptr_t, size_t> registered_;  // as the driver sees them: in whole pages where registers_pages
  uint64_t done_ = 0;                       // kernels that are known to have ended
};

}  // namespace fake

// The memory and the time of the device in device.h, and what a test may set and read.
#include "device.h"

#include <sys/mman.h>

#include <algorithm>
#include <chrono>
#include <cstdio>
#include <cstdlib>
#include <cstring>
#include <string>

namespace fake {
namespace {

long setting(const char* name, long otherwise) {
  const char* value = getenv(name);
  return value ? atol(value) : otherwise;
}

size_t rounded(size_t size, size_t page) { return (size + page - 1) / page * page; }

}  // namespace

Device& Device::get() {
  static auto* device = new Device;
  return *device;
}

Device::Device()
    : total(setting("FAKE_CUDA_TOTAL_MIB", 4096) * MIB),
      others(setting("FAKE_CUDA_OTHERS_MIB", 0) * MIB),
      page_lock_limit(setting("FAKE_CUDA_PAGE_LOCK_MIB", 1 << 30) * MIB),
      lag(setting("FAKE_CUDA_LAG", 0)),
      arithmetic(setting("FAKE_CUDA_ARITHMETIC", 0)),
      registers_pages(setting("FAKE_CUDA_REGISTERS_PAGES", 0)),
      major(setting("FAKE_CUDA_MAJOR", 8)),
      minor(setting("FAKE_CUDA_MINOR", 6)),
      multiprocessors(setting("FAKE_CUDA_MULTIPROCESSORS", 16)) {}

bool Device::take(size_t size) {
  counts.allocations++;
  if (used + size + others > total) {
    counts.refused++;
    return false;
  }
  used += size;
  peak = std::max(peak, used);
  return true;
}

void Device::give_back(size_t size) { used -= size; }

bool Device::lock_pages(size_t size) {
  if (page_locked + size > page_lock_limit) return false;
  page_locked += size;
  page_locked_peak = std::max(page_locked_peak, page_locked);
  return true;
}

void Device::unlock_pages(size_t size) { page_locked -= size; }

void* Device::map(size_t size, Kind kind) {
  void* start = mmap(nullptr, size, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
  if (start == MAP_FAILED) return nullptr;
  note(start, size, kind);
  return start;
}

void Device::unmap(void* start) {
  munmap(start, ranges_.at(uintptr_t(start)).size);
  forget(start);
}

const Range* Device::range_of(const void* address) {
  auto next = ranges_.upper_bound(uintptr_t(address));
  if (next == ranges_.begin()) return nullptr;
  auto& [start, range] = *std::prev(next);
  return uintptr_t(address) < start + range.size ? &range : nullptr;
}

const Range* Device::range_at(const void* start) {
  auto found = ranges_.find(uintptr_t(start));
  return found == ranges_.end() ? nullptr : &found->second;
}

bool Device::register_host(void* start, size_t size, bool* refused_for_limit) {
  uintptr_t first = uintptr_t(start), last = first + size;
  if (registers_pages) first = first / HOST_PAGE * HOST_PAGE, last = rounded(last, HOST_PAGE);
  auto next = registered_.lower_bound(last);
  bool overlaps = next != registered_.begin() && std::prev(next)->first + std::prev(next)->second > first;
  *refused_for_limit = !overlaps && !lock_pages(last - first);
  if (overlaps || *refused_for_limit) {
    counts.registrations_refused++;
    return false;
  }
  registered_[first] = last - first;
  note(start, size, Kind::registered);
  return true;
}

bool Device::unregister_host(void* start) {
  const Range* range = range_at(start);
  if (range == nullptr || range->kind != Kind::registered) return false;
  auto pages = std::prev(registered_.upper_bound(uintptr_t(start)));
  synchronize();
  unlock_pages(pages->second);
  registered_.erase(pages);
  forget(start);
  return true;
}

void Device::copy(void* target, const void* source, size_t size, bool waits) {
  {
    std::lock_guard guard(mutex);
    counts.copies++;
    const Range *to = range_of(target), *from = range_of(source);
    bool read_back = from && from->kind == Kind::device && !(to && to->kind == Kind::device);
    if (read_back && size <= 8 && !arithmetic) {
      // A number that the host decides on, and that nothing has computed: a loss or a count of overflows is 0, a
      // truth (one byte) is true.
      memset(target, size == 1, size);
      return;
    }
    finish_copies(source, size);  // what the copy is ordered after
    bool late = lag > 0 && arithmetic && !waits;  // without arithmetic there is nothing right to arrive
    auto is_locked = [](const Range* range) { return range && range->kind != Kind::device; };
    auto bytes = [&] { return std::vector<char>((const char*)source, (const char*)source + size); };
    if (late && read_back && is_locked(to)) {
      copies_.push_back({target, bytes(), true, counts.launches});
      return;
    }
    if (late && is_locked(from) && to && to->kind == Kind::device)
      copies_.push_back({const_cast<void*>(source), bytes(), false, counts.launches});
  }
  memmove(target, source, size);
}

void Device::finish_copies(const void* start, size_t size) {
  for (auto copy = copies_.begin(); copy != copies_.end();) {
    auto *host = (const char*)copy->host, *from = (const char*)start;
    bool is_there = start && host < from + size && from < host + copy->bytes.size();
    if (copy->after > done_ && copy->after + lag > counts.launches && !is_there) {
      ++copy;
      continue;
    }
    if (copy->arrives) memcpy(copy->host, copy->bytes.data(), copy->bytes.size());
    else if (memcmp(copy->host, copy->bytes.data(), copy->bytes.size())) counts.sources_changed++;
    copy = copies_.erase(copy);
  }
}

void Device::record(Event* event) {
  using std::chrono::steady_clock;
  *event = {true, counts.launches, std::chrono::duration<double>(steady_clock::now().time_since_epoch()).count()};
}

bool Device::reached(const Event* event) {
  bool over = !event->recorded || event->after <= done_ || event->after + lag <= counts.launches;
  if (over && event->recorded) done_ = std::max(done_, event->after), finish_copies();
  return over;
}

void Device::wait_for(const Event* event) {
  counts.synchronizations++;
  if (event->recorded) done_ = std::max(done_, event->after);
  finish_copies();
}

void Device::synchronize() {
  counts.synchronizations++;
  done_ = counts.launches;
  finish_copies();
}

}  // namespace fake

// For tests, through ctypes.

EXPORTED int fake_cuda_set(const char* name, long value) {
  auto& device = fake::Device::get();
  std::lock_guard guard(device.mutex);
  std::string key = name;
  if (key == "others_mib") device.others = value * fake::MIB;
  else if (key == "page_lock_mib") device.page_lock_limit = value * fake::MIB;
  else if (key == "lag") device.lag = value;
  else if (key == "arithmetic") device.arithmetic = value;
  else if (key == "registers_pages") device.registers_pages = value;
  else if (key == "new_peak") device.peak = device.used;
  else return 1;
  return 0;
}

EXPORTED const char* fake_cuda_report() {
  static char text[512];
  auto& device = fake::Device::get();
  std::lock_guard guard(device.mutex);
  auto& n = device.counts;
  using number = unsigned long long;
  snprintf(text, sizeof text,
           "{\"used_mib\": %.2f, \"peak_mib\": %.2f, \"page_locked_mib\": %.2f, \"page_locked_peak_mib\": %.2f, "
           "\"launches\": %llu, \"products\": %llu, \"copies\": %llu, \"allocations\": %llu, \"refused\": %llu, "
           "\"registrations_refused\": %llu, \"waits\": %llu, \"synchronizations\": %llu, \"sources_changed\": %llu}",
           double(device.used) / fake::MIB, double(device.peak) / fake::MIB, double(device.page_locked) / fake::MIB,
           double(device.page_locked_peak) / fake::MIB, number(n.launches), number(n.products), number(n.copies),
           number(n.allocations), number(n.refused), number(n.registrations_refused), number(n.waits),
           number(n.synchronizations), number(n.sources_changed));
  return text;
}

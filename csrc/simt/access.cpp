// Checks what kernels read and write: tensors, element by element where options().shadow says so, and shared arrays.
#include "state.h"

#include <sys/mman.h>

namespace mk::simt::host {
namespace {

// Zeroed memory that costs nothing where it is not touched: some per element, for tensors beyond 2^31 elements too.
template <class T>
struct Sparse {
  T* data = nullptr;
  int64_t n = 0;
  void allocate(int64_t count) {
    void* memory =
        mmap(nullptr, size_t(count) * sizeof(T), PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANONYMOUS | MAP_NORESERVE, -1, 0);
    if (memory == MAP_FAILED) return;
    data = static_cast<T*>(memory);
    n = count;
  }
  void release() {
    if (data) munmap(data, size_t(n) * sizeof(T));
    data = nullptr;
  }
};

struct Region {
  Tensor tensor;
  Traffic traffic;
  Sparse<Access> writer;  // of each element of an output
  Sparse<Cell> cells;     // of each element that may be both read and written
  Cell* shared_cells;     // the same, or those of another tensor on the same memory
  int64_t bytes() const { return tensor.elements * tensor.size; }
};
std::vector<Region> regions;

struct Array {
  const char* name;
  int line, count, size;
  char* data;
  std::vector<Cell> cells;
};
std::vector<Array> arrays;
constexpr int kSharedBytes = 48 << 10;  // what every GPU has for arrays of fixed size
alignas(16) char shared_memory[kSharedBytes];
int shared_used = 0;

const Site kNowhere{"", 0};

int64_t element_at(const Region& r, const char* p) {
  int64_t offset = int64_t(uintptr_t(p) - uintptr_t(r.tensor.data));
  return offset >= 0 ? offset / r.tensor.size : -((-offset + r.tensor.size - 1) / r.tensor.size);
}

// The tensor that the access lies in and may lie in; null and a finding where there is none.
Region* find(const char* p, int bytes, bool writing, Site site) {
  Region *forbidden = nullptr, *nearest = nullptr;
  uint64_t distance = 0;
  for (Region& r : regions) {
    uintptr_t at = uintptr_t(p), begin = uintptr_t(r.tensor.data), end = begin + uintptr_t(r.bytes());
    if (at >= begin && at + unsigned(bytes) <= end) {
      if (writing ? r.tensor.writable : r.tensor.readable) return &r;
      forbidden = &r;
    }
    uint64_t away = at < begin ? begin - at : at + unsigned(bytes) - end;
    if (!nearest || away < distance) nearest = &r, distance = away;
  }
  const char* verb = writing ? "stores" : "loads";
  if (forbidden) {
    int64_t element = element_at(*forbidden, p);
    report(writing ? Kind::not_writable : Kind::not_readable, here.thread, site, {forbidden->tensor.name, element},
           "%s element %ld of %s, which the kernel may only %s", verb, long(element), forbidden->tensor.name,
           writing ? "read" : "write");
  } else if (nearest) {
    int64_t element = element_at(*nearest, p);
    report(Kind::out_of_bounds, here.thread, site, {nearest->tensor.name, element},
           "%s %d bytes at element %ld of %s, which has %ld elements", verb, bytes, long(element), nearest->tensor.name,
           long(nearest->tensor.elements));
  } else {
    report(Kind::out_of_bounds, here.thread, site, {}, "%s %d bytes at %p, but the launch names no tensor", verb, bytes,
           static_cast<const void*>(p));
  }
  return nullptr;
}

void enter(Region& r, const char* p, int bytes, bool writing, Site site) {
  const char* name = r.tensor.name;
  int64_t first = element_at(r, p), last = element_at(r, p + bytes - 1);
  (writing ? r.traffic.written : r.traffic.read) += bytes;
  ++r.traffic.accesses;
  if (bytes < 16) ++r.traffic.narrow;
  if (uintptr_t(p) % unsigned(bytes))
    report(Kind::misaligned, here.thread, site, {name, first}, "%s %d bytes at element %ld of %s, %d bytes past a multiple of %d",
           writing ? "stores" : "loads", bytes, long(first), name, int(uintptr_t(p) % unsigned(bytes)), bytes);
  if (!r.writer.data && !r.shared_cells) return;
  Access me = now();
  for (int64_t i = first; i <= last; ++i) {
    if (writing && r.writer.data) {
      Access& writer = r.writer.data[i];
      if (writer.happened())
        report(Kind::written_twice, here.thread, site, {name, i},
               "stores element %ld of %s, which block %u, thread %d wrote already", long(i), name, writer.block, writer.thread());
      writer = me;
    }
    if (!r.shared_cells) continue;
    Access clash = r.shared_cells[i].enter(me, writing);
    if (clash.happened())
      report(Kind::global_race, here.thread, site, {name, i}, "%s element %ld of %s, no barrier after block %u, thread %d used it",
             writing ? "stores" : "loads", long(i), name, clash.block, clash.thread());
  }
}

}  // namespace

void load(const void* p, void* to, int bytes, Site site) {
  const char* from = static_cast<const char*>(p);
  Region* r = find(from, bytes, false, site);
  if (!r) {
    memset(to, 0xff, size_t(bytes));
    return;
  }
  enter(*r, from, bytes, false, site);
  memcpy(to, from, size_t(bytes));
}

void store(void* p, const void* from, int bytes, Site site) {
  char* to = static_cast<char*>(p);
  Region* r = find(to, bytes, true, site);
  if (!r) return;
  enter(*r, to, bytes, true, site);
  memcpy(to, from, size_t(bytes));
}

SharedArray shared_array(const char* name, int count, int size, Site site) {
  for (size_t i = 0; i < arrays.size(); ++i)
    if (arrays[i].line == site.line && arrays[i].size == size && !strcmp(arrays[i].name, name)) return {arrays[i].data, int(i)};
  int begin = (shared_used + 15) / 16 * 16;
  bool fits = begin + int64_t(count) * size <= kSharedBytes;
  if (!fits)
    report(Kind::bad_launch, here.thread, site, {name}, "shared arrays take %ld bytes with %s, at most %d",
           long(begin + int64_t(count) * size), name, kSharedBytes);
  else
    shared_used = begin + count * size;
  memset(shared_memory + begin, 0xff, fits ? size_t(count * size) : 0);
  arrays.push_back({name, site.line, fits ? count : 0, size, shared_memory + (fits ? begin : 0), std::vector<Cell>(size_t(count))});
  return {arrays.back().data, int(arrays.size()) - 1};
}

bool touch_shared(SharedArray handle, int i, bool writing, Site site) {
  Array& a = arrays[size_t(handle.number)];
  if (i < 0 || i >= a.count) {
    report(Kind::shared_bounds, here.thread, site, {a.name, i}, "%s element %d of %s, which has %d elements",
           writing ? "stores" : "loads", i, a.name, a.count);
    return false;
  }
  Cell& cell = a.cells[size_t(i)];
  if (!writing && !cell.write.happened())
    report(Kind::uninitialised_shared, here.thread, site, {a.name, i}, "loads element %d of %s, which nobody has written", i,
           a.name);
  Access clash = cell.enter(now(), writing);
  if (clash.happened())
    report(Kind::shared_race, here.thread, site, {a.name, i}, "%s element %d of %s, no barrier after thread %d used it",
           writing ? "stores" : "loads", i, a.name, clash.thread());
  return true;
}

void begin_launch(std::initializer_list<Tensor> tensors) {
  for (const Tensor& t : tensors)
    if (t.data && t.elements > 0) regions.push_back({t, {kernel, t.name, 0, 0, 0, 0}, {}, {}, nullptr});
  if (!options().shadow) return;
  for (Region& r : regions) {
    if (!r.tensor.writable) continue;
    if (!r.tensor.readable) r.writer.allocate(r.tensor.elements);
    std::vector<Region*> others;
    for (Region& other : regions) {
      if (&other == &r || other.tensor.data >= r.tensor.data + r.bytes() || r.tensor.data >= other.tensor.data + other.bytes())
        continue;
      if (other.tensor.data == r.tensor.data && other.tensor.elements == r.tensor.elements && other.tensor.size == r.tensor.size &&
          !other.tensor.writable)
        others.push_back(&other);
      else
        report(Kind::bad_launch, -1, kNowhere, {r.tensor.name}, "%s and %s overlap", r.tensor.name, other.tensor.name);
    }
    if (r.tensor.readable || !others.empty()) r.cells.allocate(r.tensor.elements);
    r.shared_cells = r.cells.data;
    for (Region* other : others) other->shared_cells = r.cells.data;
  }
}

void begin_block() {
  arrays.clear();
  shared_used = 0;
}

void end_launch(bool complete) {
  for (Region& r : regions) {
    count(r.traffic);
    for (int64_t i = 0; complete && r.writer.data && i < r.tensor.elements; ++i)
      if (!r.writer.data[i].happened())
        report(Kind::unwritten, -1, kNowhere, {r.tensor.name, i}, "nobody stores element %ld of %s", long(i), r.tensor.name);
    r.writer.release();
    r.cells.release();
  }
  regions.clear();
}

}  // namespace mk::simt::host

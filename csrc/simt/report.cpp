// The list of findings and the table of traffic.
#include "state.h"

#include <stdarg.h>
#include <stdio.h>

#include <utility>

namespace mk::simt::host {
namespace {

std::vector<Finding> findings;
std::vector<Site> sites;  // of each finding
std::vector<Traffic> traffic;

}  // namespace

Options& options() {
  static Options all;
  return all;
}

const char* name(Kind kind) {
  static const char* const names[] = {"divergent barrier",
                                      "divergent shuffle",
                                      "uninitialised shared memory",
                                      "race in shared memory",
                                      "outside a shared array",
                                      "outside every tensor",
                                      "misaligned",
                                      "store into an input",
                                      "load from an output",
                                      "written twice",
                                      "not written",
                                      "race in a tensor",
                                      "bad launch"};
  return names[int(kind)];
}

const char* base_name(const char* path) {
  const char* slash = strrchr(path, '/');
  return slash ? slash + 1 : path;
}

void report(Kind kind, int thread, Site site, Place place, const char* format, ...) {
  for (size_t i = 0; i < findings.size(); ++i) {
    Finding& f = findings[i];
    if (f.kind == kind && sites[i].line == site.line && f.kernel == kernel && f.tensor == place.tensor &&
        !strcmp(sites[i].file, site.file)) {
      ++f.times;
      return;
    }
  }
  char what[400];
  va_list values;
  va_start(values, format);
  int used = vsnprintf(what, sizeof what, format, values);
  va_end(values);
  if (site.line && used >= 0 && used < int(sizeof what))
    snprintf(what + used, sizeof what - size_t(used), " (%s:%d)", base_name(site.file), site.line);
  findings.push_back({kind, kernel, what, thread < 0 ? -1 : here.block, thread, place.tensor, place.element, 1});
  sites.push_back(site);
}

void count(const Traffic& t) {
  for (Traffic& known : traffic)
    if (known.kernel == t.kernel && known.tensor == t.tensor) {
      known.read += t.read;
      known.written += t.written;
      known.accesses += t.accesses;
      known.narrow += t.narrow;
      return;
    }
  traffic.push_back(t);
}

std::vector<Finding> take_findings() {
  sites.clear();
  return std::exchange(findings, {});
}
std::vector<Traffic> take_traffic() { return std::exchange(traffic, {}); }

std::string describe(const Finding& f) {
  std::string place = f.thread < 0 ? "" : "block " + std::to_string(f.block) + ", thread " + std::to_string(f.thread) + ": ";
  return f.kernel + ": " + name(f.kind) + ": " + place + f.what + (f.times > 1 ? ", " + std::to_string(f.times) + " times" : "");
}

}  // namespace mk::simt::host

// Settings and reports of the host build of the GPU kernels, for tests: the Python module megatron_kernels._simt. Importing it also
// registers the kernels as torch.ops.megatron_kernels_simt.
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "../simt/report.h"

namespace py = pybind11;
using namespace mk::simt::host;

PYBIND11_MODULE(_simt, m) {
  m.doc() = "The GPU kernels on the CPU, under checks: settings, findings and counts.";

  m.def(
      "configure",
      [](uint64_t seed, int multiprocessors, int64_t first_block, int64_t last_block, bool shadow) {
        options() = {seed, multiprocessors, first_block, last_block, shadow};
      },
      "Settings of the launches to come; what is not given is as at the start. seed: of the order in which threads and blocks "
      "run, 0 as they are numbered. multiprocessors: of the GPU that is imitated. Of every grid the blocks from first_block to "
      "last_block - 1 run. shadow: keep track of who wrote which element.",
      py::kw_only(), py::arg("seed") = 0, py::arg("multiprocessors") = Options{}.multiprocessors, py::arg("first_block") = 0,
      py::arg("last_block") = INT64_MAX, py::arg("shadow") = true);

  m.def(
      "take_findings",
      [] {
        std::vector<std::string> all;
        for (const Finding& finding : take_findings()) all.push_back(describe(finding));
        return all;
      },
      "What was found since the last call: a sentence each.");

  m.def(
      "take_traffic",
      [] {
        py::list all;
        for (const Traffic& t : take_traffic()) {
          py::dict row;
          row["kernel"] = t.kernel, row["tensor"] = t.tensor, row["read"] = t.read, row["written"] = t.written;
          row["accesses"] = t.accesses, row["narrow"] = t.narrow;
          all.append(row);
        }
        return all;
      },
      "Of each kernel and tensor since the last call: bytes read and written, loads and stores, and those of less than 16 bytes.");
}

// Launches as classes of the module. They know nothing of Triton: numbers and bytes come from _launches.py.
#include "common/bind.h"

#include "launches/launch.h"

namespace walt {
namespace {

using launches::Box;
using launches::Driver;
using launches::Launch;
using launches::Pointer;

// Launches in their order, on one stream.
class Launches {
 public:
  explicit Launches(std::vector<Launch> launches) : launches_(std::move(launches)) {
    for (const Launch& launch : launches_) bases_ = std::max(bases_, launch.bases());
  }

  // False, and nothing is launched, where this thread has no CUDA context yet.
  bool run(const std::vector<uint64_t>& addresses, uintptr_t stream) const {
    require(static_cast<int>(addresses.size()) >= bases_, "addresses are fewer than the launches need");
    const Driver& driver = Driver::get();
    void* context = nullptr;
    if (!driver.complete || driver.cuCtxGetCurrent(&context) != 0 || context == nullptr) return false;
    const py::gil_scoped_release no_gil;  // a full queue makes a launch wait
    for (const Launch& launch : launches_) {
      const launches::Result result = launch.run(driver, addresses, reinterpret_cast<void*>(stream));
      if (result != 0) fail(driver, result);
    }
    return true;
  }

 private:
  [[noreturn]] static void fail(const Driver& driver, launches::Result result) {
    const char* text = nullptr;
    if (driver.cuGetErrorString(result, &text) != 0 || text == nullptr) text = "unknown error";
    throw std::runtime_error("CUDA error " + std::to_string(result) + " at a kernel's launch: " + text);
  }

  std::vector<Launch> launches_;
  int bases_ = 0;
};

const Binding binding([](py::module_& m) {
  py::class_<Launch>(m, "Launch")
      .def(py::init([](uintptr_t function, std::array<unsigned, 3> grid, unsigned threads, unsigned shared_bytes) {
             return Launch(reinterpret_cast<void*>(function), grid, threads, shared_bytes);
           }),
           py::arg("function"), py::arg("grid"), py::arg("threads"), py::arg("shared_bytes"))
      .def("constant", &Launch::constant, py::arg("bytes"), py::arg("bits"))
      .def(
          "pointer", [](Launch& launch, int base, int64_t offset) { launch.pointer({base, offset}); }, py::arg("base"),
          py::arg("offset"))
      .def(
          "box",
          [](Launch& launch, int base, int64_t offset, int dtype, int swizzle, int fill, std::vector<uint64_t> sizes,
             std::vector<uint64_t> strides, std::vector<uint32_t> box) {
            launch.box({{base, offset}, dtype, swizzle, fill, std::move(sizes), std::move(strides), std::move(box)});
          },
          py::arg("base"), py::arg("offset"), py::arg("dtype"), py::arg("swizzle"), py::arg("fill"), py::arg("sizes"),
          py::arg("strides"), py::arg("box"))
      .def("fits", [](const Launch& launch) { return Driver::get().complete && launch.fits(Driver::get()); });
  py::class_<Launches>(m, "Launches")
      .def(py::init<std::vector<Launch>>(), py::arg("launches"))
      .def("run", &Launches::run, py::arg("addresses"), py::arg("stream"));
});

}  // namespace
}  // namespace walt

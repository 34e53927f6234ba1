// How C++ functions become Python's: an op lists the arguments of each of its kernels once, by name, and a static
// Binding in its bind.cpp adds the functions to the module.
#pragma once

#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <algorithm>
#include <cstdint>
#include <functional>
#include <initializer_list>
#include <string>
#include <vector>

namespace walt {

namespace py = pybind11;

struct Binding {
  using Add = void (*)(py::module_&);
  explicit Binding(Add add) { all().push_back(add); }
  static std::vector<Add>& all() {
    static std::vector<Add> bindings;
    return bindings;
  }
};

// Converts an argument from Python. An op adds overloads for its own types.
template <class T>
void read(py::handle value, T& to) {
  to = value.cast<T>();
}
inline void read(py::handle value, void*& to) { to = reinterpret_cast<void*>(value.cast<uintptr_t>()); }

template <class Params>
struct Argument {
  template <class T, class Owner>
  Argument(const char* name, T Owner::* member)
      : name(py::reinterpret_steal<py::str>(PyUnicode_InternFromString(name))),
        set([member](Params& params, py::handle value) { read(value, params.*member); }) {}

  py::str name;
  std::function<void(Params&, py::handle)> set;
  bool required = false;
};

// The arguments of a function, by name. An optional one that is left out, or None, stays what it is in Params{}.
template <class Params>
class Arguments {
 public:
  Arguments& optional(std::initializer_list<Argument<Params>> list) {
    list_.insert(list_.end(), list);
    return *this;
  }
  Arguments& required(std::initializer_list<Argument<Params>> list) {
    for (Argument<Params> argument : list) {
      argument.required = true;
      list_.push_back(std::move(argument));
    }
    return *this;
  }

  Params read(const std::string& function, const py::kwargs& kwargs) const {
    Params params;
    size_t known = 0;
    for (const Argument<Params>& argument : list_) {
      const py::handle value = PyDict_GetItemWithError(kwargs.ptr(), argument.name.ptr());
      known += value.ptr() != nullptr;
      if (value && !value.is_none()) {
        try {
          argument.set(params, value);
        } catch (const py::cast_error&) {
          throw py::type_error(function + ": " + std::string(argument.name) + " cannot be " +
                               std::string(py::repr(value)));
        }
      } else if (argument.required) {
        throw py::type_error(function + ": " + std::string(argument.name) + " is missing");
      }
    }
    if (known < kwargs.size()) refuse_unknown(function, kwargs);
    return params;
  }

 private:
  void refuse_unknown(const std::string& function, const py::kwargs& kwargs) const {
    for (const auto& item : kwargs) {
      const auto is_named = [&](const Argument<Params>& argument) { return argument.name.equal(item.first); };
      if (std::any_of(list_.begin(), list_.end(), is_named)) continue;
      throw py::type_error(function + ": unknown argument " + std::string(py::str(item.first)));
    }
  }

  std::vector<Argument<Params>> list_;
};

// name(*extra, **arguments) in Python: kernel(params, extra...) without the GIL.
template <class... Extra, class Params, class Kernel>
void define(py::module_& m, const char* name, const Arguments<Params>& arguments, Kernel kernel) {
  m.def(name, [=](const Extra&... extra, const py::kwargs& kwargs) {
    const Params params = arguments.read(name, kwargs);
    const py::gil_scoped_release no_gil;
    return kernel(params, extra...);
  });
}

}  // namespace walt

// The Python face of the native library: functions that take addresses and sizes as integers. They check nothing but
// the number of arguments; quanto_hf/ops checks tensors before it calls. The stable ABI serves every Python from 3.10.
#define Py_LIMITED_API 0x030A0000
#define PY_SSIZE_T_CLEAN
#include <Python.h>

#include "entry_points.h"

#if !defined(QUANTO_SOURCES)
#define QUANTO_SOURCES 0  // not built by setup.py
#endif

namespace {

using namespace quanto;

const Level* levels[MAX_LEVELS];
int level_count = 0;
const Level* active = nullptr;

// Integers from Python, read in order.
struct Arguments {
    PyObject* const* values;
    long long next() { return PyLong_AsLongLong(*values++); }
    template <class T>
    T* address() {
        return reinterpret_cast<T*>(static_cast<uintptr_t>(PyLong_AsUnsignedLongLong(*values++)));
    }
};

Weight read_weight(Arguments& in) {
    Weight w;
    w.packed = in.address<const uint8_t>();
    w.scale = in.address<const void>();
    w.zero = in.address<const void>();
    w.table = in.address<const float>();
    w.n = in.next();
    w.k = in.next();
    w.group = in.next();
    if (w.group <= 0 || w.group > w.k) w.group = w.k > 0 ? w.k : 1;
    w.groups = w.k > 0 ? (w.k + w.group - 1) / w.group : 1;
    w.codes = static_cast<int>(in.next());
    w.scale_type = static_cast<int>(in.next());
    return w;
}
constexpr Py_ssize_t WEIGHT_ARGUMENTS = 9;

bool ready(Py_ssize_t got, Py_ssize_t wanted) {
    if (!active) PyErr_SetString(PyExc_RuntimeError, "no native kernels for this processor");
    else if (got != wanted) PyErr_Format(PyExc_TypeError, "expected %zd integers, got %zd", wanted, got);
    else return true;
    return false;
}

bool offers(const void* kernel) {
    if (!kernel) PyErr_Format(PyExc_NotImplementedError, "level %s has no such kernel", active->name);
    return kernel != nullptr;
}

// All of a call but the weight.
void read_call(Arguments& in, Linear& a) {
    a.x = in.address<const void>();
    a.bias = in.address<const void>();
    a.out = in.address<void>();
    a.m = in.next();
    a.x_type = static_cast<int>(in.next());
    a.threads = static_cast<int>(in.next());
}

Linear read_linear(Arguments& in) {
    Linear a;
    a.w = read_weight(in);
    read_call(in, a);
    return a;
}
constexpr Py_ssize_t LINEAR_ARGUMENTS = WEIGHT_ARGUMENTS + 6;

PyObject* run_linear(void (*kernel)(const Linear&), PyObject* const* values, bool scaled = false) {
    if (!offers(reinterpret_cast<const void*>(kernel))) return nullptr;
    Arguments in{values};
    Linear a = read_linear(in);
    if (scaled) a.x_scale = in.address<const float>();
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    kernel(a);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
    return ready(count, LINEAR_ARGUMENTS) ? run_linear(active->linear, values) : nullptr;
}

PyObject* linear_int8(PyObject*, PyObject* const* values, Py_ssize_t count) {
    return ready(count, LINEAR_ARGUMENTS + 1) ? run_linear(active->linear_int8, values, true) : nullptr;
}

PyObject* expert_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, LINEAR_ARGUMENTS + 2)) return nullptr;
    Arguments in{values};
    ExpertLinear e;
    e.a = read_linear(in);
    e.ids = in.address<const int64_t>();
    e.experts = in.next();
    if (PyErr_Occurred()) return nullptr;
    bool found;
    Py_BEGIN_ALLOW_THREADS
    found = quanto::expert_linear(*active, e);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

PyObject* linear_int8_groups(PyObject*, PyObject* const* values, Py_ssize_t count) {
    return ready(count, LINEAR_ARGUMENTS + 1) ? run_linear(active->linear_int8_groups, values, true) : nullptr;
}

// Whether each of these numbers is one of 0, 1, ... n - 1.
bool all_below(const int64_t* numbers, int64_t count, int64_t n) {
    for (int64_t i = 0; i < count; i++)
        if (numbers[i] < 0 || numbers[i] >= n) return false;
    return true;
}

PyObject* dequantize(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, WEIGHT_ARGUMENTS + 5)) return nullptr;
    Arguments in{values};
    const Weight w = read_weight(in);
    const int64_t* rows = in.address<const int64_t>();
    const int64_t row_count = in.next();
    void* out = in.address<void>();
    const int out_type = static_cast<int>(in.next()), threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    bool found;
    Py_BEGIN_ALLOW_THREADS
    found = !rows || all_below(rows, row_count, w.n);
    if (found) active->dequantize(w, out_type, out, rows, row_count, threads);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(found);
}

// The description goes to `q`, to which the weight points.
Weight read_aqlm(Arguments& in, Aqlm& q) {
    Weight w{};
    q.codes = in.address<const void>();
    q.codebooks = in.address<const void>();
    q.scales = in.address<const void>();
    w.n = in.next();
    w.k = in.next();
    q.books = in.next();
    q.out_group = in.next();
    q.in_group = in.next();
    q.bits = static_cast<int>(in.next());
    q.code_bytes = static_cast<int>(in.next());
    q.book_type = static_cast<int>(in.next());
    q.scale_type = static_cast<int>(in.next());
    w.aqlm = &q;
    return w;
}
constexpr Py_ssize_t AQLM_ARGUMENTS = 12;

PyObject* aqlm_linear(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, AQLM_ARGUMENTS + 6) || !offers(reinterpret_cast<const void*>(active->aqlm_linear))) return nullptr;
    Arguments in{values};
    Aqlm q;
    Linear a;
    a.w = read_aqlm(in, q);
    read_call(in, a);
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    active->aqlm_linear(a);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* aqlm_dequantize(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, AQLM_ARGUMENTS + 3) || !offers(reinterpret_cast<const void*>(active->aqlm_dequantize))) return nullptr;
    Arguments in{values};
    Aqlm q;
    const Weight w = read_aqlm(in, q);
    void* out = in.address<void>();
    const int out_type = static_cast<int>(in.next()), threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    active->aqlm_dequantize(w, out_type, out, threads);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* quantize(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, 16) || !offers(reinterpret_cast<const void*>(active->quantize))) return nullptr;
    Arguments in{values};
    Quantize q;
    q.in = in.address<const void>();
    q.packed = in.address<uint8_t>();
    q.scale = in.address<void>();
    q.zero = in.address<void>();
    q.table = in.address<const float>();
    q.numbers = in.address<const double>();
    q.number_count = in.next();
    q.n = in.next();
    q.k = in.next();
    q.stride = in.next();
    q.group = in.next();
    q.in_type = static_cast<int>(in.next());
    q.scale_type = static_cast<int>(in.next());
    q.codes = static_cast<int>(in.next());
    q.fit = static_cast<int>(in.next());
    q.threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    bool finite;
    Py_BEGIN_ALLOW_THREADS
    finite = active->quantize(q);
    Py_END_ALLOW_THREADS
    return PyBool_FromLong(finite);
}

Codebooks read_codebooks(Arguments& in) {
    Codebooks b;
    b.values = in.address<const float>();
    b.count = in.next();
    b.size = in.next();
    b.width = in.next();
    return b;
}

PyObject* aqlm_search(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, 9)) return nullptr;
    Arguments in{values};
    AqlmSearch a;
    a.books = read_codebooks(in);
    a.targets = in.address<const float>();
    a.codes = in.address<int32_t>();
    a.n = in.next();
    a.beam = static_cast<int>(in.next());
    a.threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    aqlm_fit_of(*active).search(a);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* aqlm_sweep(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, 16)) return nullptr;
    Arguments in{values};
    AqlmSweep a;
    a.books = read_codebooks(in);
    a.state = in.address<float>();
    a.weight = in.address<const float>();
    a.follow = in.address<const float>();
    a.lower = in.address<const float>();
    a.to = in.address<const float>();
    a.codes = in.address<int32_t>();
    a.rows = in.next();
    a.columns = in.next();
    a.out_group = in.next();
    a.in_group = in.next();
    a.beam = static_cast<int>(in.next());
    a.threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    aqlm_fit_of(*active).sweep(a);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* product(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, 8)) return nullptr;
    Arguments in{values};
    Product p;
    p.a = in.address<const float>();
    p.b = in.address<const float>();
    p.out = in.address<float>();
    p.m = in.next();
    p.n = in.next();
    p.k = in.next();
    p.stride = in.next();
    p.threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    aqlm_fit_of(*active).product(p);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* code_sums(PyObject*, PyObject* const* values, Py_ssize_t count) {
    if (!ready(count, 11)) return nullptr;
    Arguments in{values};
    CodeSums s;
    s.values = in.address<const float>();
    s.weights = in.address<const float>();
    s.codes = in.address<const int32_t>();
    s.sums = in.address<double>();
    s.totals = in.address<double>();
    s.n = in.next();
    s.per_weight = in.next();
    s.count = in.next();
    s.size = in.next();
    s.width = in.next();
    s.threads = static_cast<int>(in.next());
    if (PyErr_Occurred()) return nullptr;
    Py_BEGIN_ALLOW_THREADS
    quanto::code_sums(s);
    Py_END_ALLOW_THREADS
    Py_RETURN_NONE;
}

PyObject* level_names(PyObject*, PyObject*) {
    PyObject* names = PyList_New(0);
    for (int i = 0; names && i < level_count; i++) {
        PyObject* name = PyUnicode_FromString(levels[i]->name);
        if (!name || PyList_Append(names, name)) Py_CLEAR(names);
        Py_XDECREF(name);
    }
    return names;
}

PyObject* has_kernel(PyObject*, PyObject* name) {
    const auto is = [&](const char* kernel) { return PyUnicode_CompareWithASCIIString(name, kernel) == 0; };
    if (!active) Py_RETURN_FALSE;
    if (is("quantize")) return PyBool_FromLong(active->quantize != nullptr);
    if (is("linear_int8")) return PyBool_FromLong(active->linear_int8 != nullptr);
    if (is("linear_int8_groups")) return PyBool_FromLong(active->linear_int8_groups != nullptr);
    if (is("aqlm_linear")) return PyBool_FromLong(active->aqlm_linear != nullptr);
    if (is("aqlm_dequantize")) return PyBool_FromLong(active->aqlm_dequantize != nullptr);
    return PyBool_FromLong(is("linear") || is("dequantize"));
}

PyObject* use_level(PyObject*, PyObject* name) {
    for (int i = 0; i < level_count; i++) {
        if (PyUnicode_CompareWithASCIIString(name, levels[i]->name) == 0) {
            active = levels[i];
            Py_RETURN_NONE;
        }
    }
    return PyErr_Format(PyExc_ValueError, "this processor does not offer %R", name);
}

PyObject* level(PyObject*, PyObject*) {
    if (!active) Py_RETURN_NONE;
    return PyUnicode_FromString(active->name);
}

PyObject* entry_points(PyObject*, PyObject*) {
    static const EntryPoints all = {QUANTO_SOURCES, available_levels, quanto::expert_linear, aqlm_fit_of, quanto::code_sums};
    return PyLong_FromVoidPtr(const_cast<EntryPoints*>(&all));
}

PyMethodDef methods[] = {
    {"linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(linear)), METH_FASTCALL, "out = x @ weight.T + bias"},
    {"linear_int8", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(linear_int8)), METH_FASTCALL, "the same with x rounded to int8"},
    {"expert_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(expert_linear)), METH_FASTCALL,
     "rows of x times the weights of their experts; False: there is no such expert"},
    {"linear_int8_groups", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(linear_int8_groups)), METH_FASTCALL, "the same for int4 and int2, by 32 columns"},
    {"dequantize", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(dequantize)), METH_FASTCALL,
     "rows of a weight as floats; False: there is no such row"},
    {"quantize", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(quantize)), METH_FASTCALL, "codes, scale and zero of a float matrix"},
    {"aqlm_search", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(aqlm_search)), METH_FASTCALL, "better codes for groups of additive codebooks"},
    {"aqlm_sweep", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(aqlm_sweep)), METH_FASTCALL, "the same with error compensation"},
    {"product", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(product)), METH_FASTCALL, "a product of matrices that no number of threads changes"},
    {"code_sums", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(code_sums)), METH_FASTCALL, "sums of the groups of each code"},
    {"aqlm_linear", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(aqlm_linear)), METH_FASTCALL, "linear for sums of codebook entries"},
    {"aqlm_dequantize", reinterpret_cast<PyCFunction>(reinterpret_cast<void*>(aqlm_dequantize)), METH_FASTCALL, "such a weight as floats"},
    {"levels", level_names, METH_NOARGS, "names of the levels that this processor can run, best first"},
    {"level", level, METH_NOARGS, "name of the level in use, or None"},
    {"has_kernel", has_kernel, METH_O, "whether the level in use has the kernel of that name"},
    {"use_level", use_level, METH_O, "choose a level by name"},
    {"entry_points", entry_points, METH_NOARGS, "address of the C++ functions, for tests/native (csrc/entry_points.h)"},
    {nullptr, nullptr, 0, nullptr},
};

PyModuleDef definition = {PyModuleDef_HEAD_INIT, "_native", "Native CPU kernels.", -1, methods, nullptr, nullptr, nullptr, nullptr};

}  // namespace

PyMODINIT_FUNC PyInit__native() {
    level_count = available_levels(levels);
    active = level_count ? levels[0] : nullptr;
    return PyModule_Create(&definition);
}

// Random numbers, failures, and which calls have been made. Included by test_kernels.cpp inside its namespace.

const char* const CODE_NAMES[] = {"int8", "e4m3", "e5m2", "table4", "table2"};
const char* const FLOAT_NAMES[] = {"f32", "bf16", "f16"};

std::mt19937 generator(1);
int failures = 0;
long checks = 0;

double uniform(double low, double high) {  // std::uniform_real_distribution differs between libraries
    return low + (high - low) * (generator() / 4294967296.0);
}
template <class T>
T any_of(std::initializer_list<T> choices) {
    return choices.begin()[generator() % choices.size()];
}

__attribute__((format(printf, 1, 2))) bool fail(const char* format, ...) {
    if (++failures <= 20) {
        va_list arguments;
        va_start(arguments, format);
        std::fputs("FAILED: ", stdout);
        std::vprintf(format, arguments);
        std::fputs("\n", stdout);
        std::fflush(stdout);
        va_end(arguments);
    }
    return false;
}

// "level kernel codes variant dtype rows", each once. `rows` is 0 where a kernel has no rows of x.
std::set<std::string> calls;
void note(const char* level, const char* kernel, const char* codes, const char* variant, int type, int64_t rows) {
    char text[120];
    std::snprintf(text, sizeof text, "%s %s %s %s %s %lld", level, kernel, codes, variant, FLOAT_NAMES[type],
                  static_cast<long long>(rows));
    calls.insert(text);
}

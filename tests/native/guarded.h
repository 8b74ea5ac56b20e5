// Memory that ends at a page that may not be touched. Included by test_kernels.cpp inside its namespace.

// Bytes that end where a protected page begins; what lies before them is filled, and may be checked.
class Guarded {
public:
    Guarded() = default;
    explicit Guarded(size_t bytes) : size_(bytes) {
        const size_t page = static_cast<size_t>(sysconf(_SC_PAGESIZE));
        open_ = (bytes / page + 1) * page;
        void* p = mmap(nullptr, open_ + page, PROT_READ | PROT_WRITE, MAP_PRIVATE | MAP_ANON, -1, 0);
        if (p == MAP_FAILED || mprotect(static_cast<char*>(p) + open_, page, PROT_NONE) != 0) {
            std::perror("guarded memory");
            std::exit(2);
        }
        map_ = static_cast<uint8_t*>(p), mapped_ = open_ + page;
        std::memset(map_, FILL, open_);
    }
    Guarded(const Guarded&) = delete;
    Guarded& operator=(const Guarded&) = delete;
    Guarded(Guarded&& other) noexcept { *this = std::move(other); }
    Guarded& operator=(Guarded&& other) noexcept {
        std::swap(map_, other.map_), std::swap(mapped_, other.mapped_);
        std::swap(open_, other.open_), std::swap(size_, other.size_);
        return *this;
    }
    ~Guarded() {
        if (map_) munmap(map_, mapped_);
    }
    template <class T = void>
    T* get() const {
        return reinterpret_cast<T*>(map_ + open_ - size_);
    }
    size_t size() const { return size_; }
    bool intact() const {  // nothing has been written in front of it
        return std::all_of(map_, map_ + open_ - size_, [](uint8_t b) { return b == FILL; });
    }

private:
    static constexpr uint8_t FILL = 0xFF;  // a NaN in every type of float
    uint8_t* map_ = nullptr;
    size_t mapped_ = 0, open_ = 0, size_ = 0;
};
bool same_bits(const Guarded& a, const Guarded& b) { return a.size() == b.size() && !std::memcmp(a.get(), b.get(), a.size()); }

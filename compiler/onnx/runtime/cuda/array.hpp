// A growing array of plain data, without a C++ runtime.
#pragma once

#include <stddef.h>
#include <stdlib.h>

#include <type_traits>

namespace sage_cuda {

template <class T>
class Array {
    static_assert(std::is_trivially_copyable_v<T>, "elements are moved by realloc");

 public:
    Array() = default;
    Array(const Array&) = delete;
    Array& operator=(const Array&) = delete;
    ~Array() { free(data_); }

    // False where there is no memory; the array is then as before.
    bool push(const T& element) {
        if (size_ == capacity_ && !reserve(capacity_ == 0 ? 16 : 2 * capacity_)) return false;
        data_[size_++] = element;
        return true;
    }

    // Makes room for `count` elements, and has them, uninitialized.
    bool resize(size_t count) {
        if (count > capacity_ && !reserve(count)) return false;
        size_ = count;
        return true;
    }

    T* data() { return data_; }
    size_t size() const { return size_; }
    T& operator[](size_t index) { return data_[index]; }
    const T& operator[](size_t index) const { return data_[index]; }
    const T* begin() const { return data_; }
    const T* end() const { return data_ + size_; }

 private:
    bool reserve(size_t count) {
        void* const grown = realloc(data_, count * sizeof(T));
        if (grown == nullptr) return false;
        data_ = static_cast<T*>(grown);
        capacity_ = count;
        return true;
    }

    T* data_ = nullptr;
    size_t size_ = 0, capacity_ = 0;
};

}  // namespace sage_cuda

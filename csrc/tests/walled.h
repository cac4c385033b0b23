// Arrays whose surroundings are known, so that a stray write is seen without a sanitizer too.
#pragma once

#include <cstdint>
#include <cstring>
#include <new>

namespace lyapcuda::test {

// n elements between two walls of known bytes, `shift` elements off a 64-byte boundary. With
// `behind` = 0 nothing lies behind them, so that AddressSanitizer sees even a read beyond the end.
template <class T>
class Walled {
 public:
  Walled(int64_t n, int64_t shift, int64_t behind)
      : n_(n), front_(64 + shift * int64_t{sizeof(T)}), behind_(behind) {
    const int64_t bytes = front_ + n * int64_t{sizeof(T)} + behind;
    raw_ = static_cast<unsigned char*>(::operator new(bytes, std::align_val_t{64}));
    std::memset(raw_, kWall, bytes);
  }
  ~Walled() { ::operator delete(raw_, std::align_val_t{64}); }
  Walled(const Walled&) = delete;
  Walled& operator=(const Walled&) = delete;

  int64_t size() const { return n_; }
  T* data() { return reinterpret_cast<T*>(raw_ + front_); }
  const T* data() const { return reinterpret_cast<const T*>(raw_ + front_); }
  T& operator[](int64_t i) { return data()[i]; }
  const T& operator[](int64_t i) const { return data()[i]; }

  // Nothing outside was written.
  bool whole() const {
    const unsigned char* const end = raw_ + front_ + n_ * int64_t{sizeof(T)};
    return is_wall(raw_, front_) && is_wall(end, behind_);
  }
  // Nor was any of [begin, end).
  bool untouched(int64_t begin, int64_t end) const {
    return is_wall(reinterpret_cast<const unsigned char*>(data() + begin),
                   (end - begin) * int64_t{sizeof(T)});
  }

 private:
  static constexpr unsigned char kWall = 0xA5;
  static bool is_wall(const unsigned char* from, int64_t bytes) {
    for (int64_t i = 0; i < bytes; ++i) {
      if (from[i] != kWall) return false;
    }
    return true;
  }

  int64_t n_, front_, behind_;
  unsigned char* raw_;
};

}  // namespace lyapcuda::test

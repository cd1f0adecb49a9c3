#include "scratch.h"

#include <memory>
#include <new>

namespace eepass {
namespace {

struct Free {
  void operator()(char* p) const { ::operator delete(p, std::align_val_t{64}); }
};
struct Room {
  std::unique_ptr<char, Free> memory;
  int64_t size = 0;
};

}  // namespace

char* scratch(int64_t bytes, int which) {
  static thread_local Room rooms[2];
  Room& room = rooms[which];
  if (bytes > room.size) {
    room.memory.reset();
    room.memory.reset(static_cast<char*>(
        ::operator new(static_cast<std::size_t>(bytes), std::align_val_t{64})));
    room.size = bytes;
  }
  return room.memory.get();
}

}  // namespace eepass

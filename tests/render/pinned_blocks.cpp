// torch's own allocator of pinned memory on ordinary memory, with the settings of the first argument. As with CUDA, a parser of
// a device is registered, and unknown settings are an error. Exits with 1 if a tensor gets less memory than it has bytes.
#include <ATen/core/CachingHostAllocator.h>
#include <c10/core/AllocatorConfig.h>

#include <cstdlib>
#include <iostream>
#include <map>

struct Event {};

struct Allocator : at::CachingHostAllocatorImpl<c10::Stream, Event> {
  std::map<void*, size_t> sizes;
  void allocate_host_memory(size_t size, void** block) override {
    *block = std::malloc(size);
    sizes[*block] = size;
  }
  void free_block(at::HostBlock<c10::Stream>* block) override { std::free(block->ptr_); }
  void record_stream(std::optional<std::vector<Event>>& events, c10::Stream) override { events->emplace_back(); }
  bool query_event(Event&) override { return true; }
};

int main(int, char** arguments) {
  c10::CachingAllocator::AcceleratorAllocatorConfig::registerDeviceConfigParserHook([](const std::string&) {}, {"of_the_device"});
  c10::CachingAllocator::setAllocatorSettings(arguments[1]);
  // Two clips; factors of two LoRAs, and of one; weights of FLUX. Each pair has one power of two.
  const size_t pairs[][2] = {
      {25ul * 1024 * 576 * 3, 25ul * 1024 * 640 * 3},
      {12288ul * 64 * 2, 15360ul * 64 * 2},
      {3072ul * 16 * 2, 3072ul * 20 * 2},
      {3072ul * 3072 * 2, 3072ul * 4096 * 2},
  };
  bool is_short = false;
  for (const auto& [freed, asked] : pairs) {
    Allocator allocator;
    allocator.free(allocator.allocate(freed).second);
    const size_t got = allocator.sizes[allocator.allocate(asked).first];
    std::cout << asked << " bytes: got a block of " << got << "\n";
    is_short |= got < asked;
  }
  return is_short;
}

// Device guard for CUDA that does nothing: fake tensors on `cuda` need one, and torch for the CPU has none.
#include <c10/core/impl/DeviceGuardImplInterface.h>

namespace c10::impl {

struct NoOpGuard final : public DeviceGuardImplInterface {
  static constexpr DeviceType static_type = DeviceType::CUDA;
  DeviceType type() const override { return static_type; }
  Device exchangeDevice(Device) const override { return Device(static_type, 0); }
  Device getDevice() const override { return Device(static_type, 0); }
  void setDevice(Device) const override {}
  void uncheckedSetDevice(Device) const noexcept override {}
  Stream getStream(Device) const override { return Stream(Stream::DEFAULT, Device(static_type, 0)); }
  Stream exchangeStream(Stream stream) const override { return stream; }
  DeviceIndex deviceCount() const noexcept override { return 1; }
};

C10_REGISTER_GUARD_IMPL(CUDA, NoOpGuard)

}  // namespace c10::impl

// The emulated npu itself: devices, streams, events, memory, random numbers, operators and what is counted of them.
//
// An npu tensor is a PrivateUse1 tensor on host memory. An operator runs as the CPU's own: `run` dresses the npu
// arguments as CPU tensors on the very same storages, calls the CPU kernel and relabels what comes out. Nothing is
// copied, so views, in-place writes and resizing are right by construction, and results equal the CPU's bit by bit.
#include <ATen/CPUGeneratorImpl.h>
#include <ATen/detail/PrivateUse1HooksInterface.h>
#include <ATen/ops/_to_copy_native.h>
#include <ATen/ops/all_ops.h>
#include <ATen/ops/bernoulli_ops.h>
#include <ATen/ops/clone_ops.h>
#include <ATen/ops/contiguous_ops.h>
#include <ATen/ops/copy_ops.h>
#include <ATen/ops/div_ops.h>
#include <ATen/ops/empty_like_native.h>
#include <ATen/ops/empty_like_ops.h>
#include <ATen/ops/fill_ops.h>
#include <ATen/ops/isfinite_ops.h>
#include <ATen/ops/item_ops.h>
#include <ATen/ops/mul_ops.h>
#include <ATen/ops/nan_to_num_ops.h>
#include <ATen/ops/sub_ops.h>
#include <c10/core/CPUAllocator.h>
#include <c10/core/impl/DeviceGuardImplInterface.h>
#include <pthread.h>
#include <sys/syscall.h>
#include <torch/csrc/distributed/c10d/reducer_timer.hpp>
#include <torch/library.h>
#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <chrono>
#include <cstdlib>
#include <cstring>
#include <ctime>
#include <limits>
#include <map>
#include <memory>
#include <mutex>
#include <set>
#include <string>
#include <unordered_map>
#include <vector>

namespace at::autocast {  // from ATen/autocast_mode.h, which takes long to compile
TORCH_API Tensor cached_cast(at::ScalarType to, const Tensor& tensor, c10::DeviceType device);
TORCH_API at::ScalarType get_autocast_dtype(at::DeviceType device);
}  // namespace at::autocast

namespace {
using at::Tensor;
using c10::Device;
using c10::DeviceIndex;
using c10::DispatchKey;
using c10::DispatchKeySet;
using c10::IValue;
using c10::OperatorHandle;
using torch::jit::Stack;

constexpr c10::DeviceType kNpu = c10::DeviceType::PrivateUse1;
constexpr int kMaxDevices = 64;

// ------------------------------------------------------------------------------------------------ what is counted

enum class Fused { kNot, kSgd, kAdamW };

struct Op {  // what `run` must know of an operator, asked of its schema once
  std::string name;
  std::vector<bool> writes;  // by argument
  bool aliases = false;      // a result may be one of the arguments
  bool indexes = false;      // index, index_put_: the indices may lie on the host
  bool foreach = false;
  Fused fused = Fused::kNot;
  bool synchronizes = false;
  bool keeps_strides = false;  // of its result, which others make in the NPU's memory format
  bool computes = true;        // and does not only allocate or view
  bool unscales = false;       // asks for the flag of an overflow on a first-generation card
  std::atomic<long> count{0};
};

struct Counters {
  std::mutex mutex;
  std::map<std::string, long> copies{
      {"h2d", 0}, {"h2d_non_blocking", 0}, {"d2h", 0}, {"d2h_non_blocking", 0}, {"d2d", 0}};
  std::map<std::string, long> synchronizations;
  std::vector<std::string> setup;
  std::unordered_map<const c10::FunctionSchema*, std::unique_ptr<Op>> ops;
};
Counters& counters() {
  static auto* all = new Counters;  // never destroyed: tensors may die after static objects
  return *all;
}

void (*tracer)(const char* kind, const char* detail) = nullptr;

void synchronization(const std::string& reason) {
  {
    std::lock_guard<std::mutex> lock(counters().mutex);
    ++counters().synchronizations[reason];
  }
  if (tracer) tracer("synchronization", reason.c_str());
}

void copied(const char* kind, bool non_blocking, size_t bytes) {
  {
    std::lock_guard<std::mutex> lock(counters().mutex);
    ++counters().copies[kind];
    if (non_blocking) ++counters().copies[std::string(kind) + "_non_blocking"];
  }
  if (tracer) tracer(kind, (std::to_string(bytes) + (non_blocking ? " bytes, non_blocking" : " bytes")).c_str());
}

void set_up(const char* call) {
  std::lock_guard<std::mutex> lock(counters().mutex);
  counters().setup.emplace_back(call);
}

bool main_thread() { return syscall(SYS_gettid) == getpid(); }

// ------------------------------------------------------------------------------------------------ devices

DeviceIndex count() {
  static const DeviceIndex n = [] {
    const char* value = std::getenv("EMULATED_NPU_COUNT");
    return static_cast<DeviceIndex>(std::min(value && *value ? std::atoi(value) : 2, kMaxDevices));
  }();
  return n;
}

std::atomic<bool> initialized{false};
bool forked = false;  // in a child forked after initialization, where the card can't be used

void initialize() {
  if (initialized && !forked) return;
  TORCH_CHECK(!forked, "Cannot re-initialize NPU in forked subprocess. To use NPU with multiprocessing, ",
              "you must use the 'spawn' start method");
  TORCH_CHECK(count() > 0, "No NPUs are available");
  initialized = true;
}

void check(DeviceIndex index) {
  TORCH_CHECK(index >= 0 && index < count(), "Invalid NPU device id ", int(index), ": ", int(count()), " available");
}

thread_local DeviceIndex current = 0;
thread_local std::vector<c10::StreamId> streams;

struct Guard final : c10::impl::DeviceGuardImplInterface {
  static Device full(Device d) { return Device(kNpu, d.has_index() ? d.index() : current); }
  static c10::StreamId& slot(Device d) {
    streams.resize(kMaxDevices, 0);
    return streams[full(d).index()];
  }
  c10::DeviceType type() const override { return kNpu; }
  Device exchangeDevice(Device d) const override {
    Device old = getDevice();
    setDevice(d);
    return old;
  }
  Device getDevice() const override { return Device(kNpu, current); }
  void setDevice(Device d) const override {
    check(d.index());
    current = d.index();
  }
  void uncheckedSetDevice(Device d) const noexcept override { current = d.index(); }
  DeviceIndex deviceCount() const noexcept override { return count(); }

  c10::Stream getStream(Device d) const override { return c10::Stream(c10::Stream::UNSAFE, full(d), slot(d)); }
  c10::Stream getDefaultStream(Device d) const override { return c10::Stream(c10::Stream::DEFAULT, full(d)); }
  c10::Stream getStreamFromGlobalPool(Device d, bool) const override { return getNewStream(d, 0); }
  c10::Stream getNewStream(Device d, int) const override {
    static std::atomic<c10::StreamId> last{0};
    return c10::Stream(c10::Stream::UNSAFE, full(d), ++last);
  }
  c10::Stream exchangeStream(c10::Stream s) const override {
    c10::Stream old = getStream(s.device());
    slot(s.device()) = s.id();
    return old;
  }
  bool queryStream(const c10::Stream&) const override { return true; }
  void synchronizeStream(const c10::Stream&) const override { synchronization("stream.synchronize"); }
  void synchronizeDevice(DeviceIndex) const override {
    initialize();
    synchronization("torch.npu.synchronize");
  }

  void record(void** event, const c10::Stream&, DeviceIndex, c10::EventFlag) const override {  // an event is a time
    if (!*event) *event = new double;
    auto now = std::chrono::steady_clock::now().time_since_epoch();
    *static_cast<double*>(*event) = std::chrono::duration<double, std::milli>(now).count();
  }
  void destroyEvent(void* event, DeviceIndex) const noexcept override { delete static_cast<double*>(event); }
  void block(void*, const c10::Stream&) const override {}
  bool queryEvent(void*) const override { return true; }
  void synchronizeEvent(void*) const override {
    synchronization(main_thread() ? "event.synchronize" : "event.synchronize (other thread)");
  }
  double elapsedTime(void* start, void* end, DeviceIndex) const override {
    return *static_cast<double*>(end) - *static_cast<double*>(start);
  }
};

// ------------------------------------------------------------------------------------------------ memory

std::atomic<long> allocated[kMaxDevices], peak[kMaxDevices];

struct Block {  // the memory of a storage on a card: a host storage, which CPU tensors can be made on
  c10::Storage host;
  long bytes;
  DeviceIndex index;
};

void release(void* context) {
  auto* block = static_cast<Block*>(context);
  allocated[block->index] -= block->bytes;
  delete block;
}

long memory() {  // of a card, in bytes
  static const char* megabytes = std::getenv("EMULATED_NPU_MEMORY");
  static const long bytes = megabytes ? std::atol(megabytes) << 20 : std::numeric_limits<long>::max();
  return bytes;
}

c10::DataPtr on_card(const c10::Storage& host, DeviceIndex index) {
  long bytes = static_cast<long>(host.nbytes());
  TORCH_CHECK(
      bytes <= memory() - allocated[index], "NPU out of memory. Tried to allocate ", bytes / 1048576.0, " MiB (NPU ",
      static_cast<int>(index), "; ", memory() >> 20, " MiB total capacity; ", allocated[index] >> 20,
      " MiB already allocated)");
  auto* block = new Block{host, static_cast<long>(host.nbytes()), index};
  if (block->bytes) {
    static std::once_flag first;
    std::call_once(first, [] { set_up("first tensor"); });
    long now = allocated[index] += block->bytes;
    for (long seen = peak[index]; now > seen && !peak[index].compare_exchange_weak(seen, now);) {
    }
  }
  return {host.mutable_data(), block, &release, Device(kNpu, index)};
}

struct CardAllocator final : c10::Allocator {
  c10::DataPtr allocate(size_t bytes) override {
    initialize();
    auto* cpu = c10::GetCPUAllocator();
    c10::StorageImpl::use_byte_size_t size;
    return on_card(c10::make_intrusive<c10::StorageImpl>(size, bytes, cpu->allocate(bytes), cpu, true), current);
  }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} card_allocator;

c10::Storage card_storage(const c10::Storage& host, DeviceIndex index) {
  return c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), host.nbytes(), on_card(host, index), &card_allocator, true);
}

const c10::Storage& host_storage(const c10::Storage& card) {
  auto* block = card.data_ptr().cast_context<Block>(&release);
  TORCH_CHECK(block, "this storage was not allocated by the emulated npu");
  return block->host;
}

std::mutex pinned_mutex;
std::map<const char*, size_t> pinned;

struct PinnedAllocator final : c10::Allocator {
  static void release(void* address) {
    {
      std::lock_guard<std::mutex> lock(pinned_mutex);
      pinned.erase(static_cast<const char*>(address));
    }
    c10::GetCPUAllocator()->raw_deallocate(address);
  }
  c10::DataPtr allocate(size_t bytes) override {
    void* address = c10::GetCPUAllocator()->raw_allocate(std::max<size_t>(bytes, 1));
    std::lock_guard<std::mutex> lock(pinned_mutex);
    pinned[static_cast<const char*>(address)] = std::max<size_t>(bytes, 1);
    return {address, address, &release, Device(c10::kCPU)};
  }
  c10::DeleterFnPtr raw_deleter() const override { return &release; }
  void copy_data(void* to, const void* from, size_t bytes) const override { default_copy_data(to, from, bytes); }
} pinned_allocator;

bool is_pinned(const void* address) {
  std::lock_guard<std::mutex> lock(pinned_mutex);
  auto after = pinned.upper_bound(static_cast<const char*>(address));
  if (after == pinned.begin()) return false;
  auto block = std::prev(after);
  return static_cast<const char*>(address) < block->first + block->second;
}

// ------------------------------------------------------------------------------------------------ random numbers

struct Generator final : c10::GeneratorImpl {  // a CPU generator under the npu's name
  at::Generator host;
  explicit Generator(DeviceIndex index, at::Generator host = at::detail::createCPUGenerator())
      : GeneratorImpl(Device(kNpu, index), DispatchKeySet(DispatchKey::PrivateUse1)), host(std::move(host)) {}
  void set_current_seed(uint64_t seed) override { host.set_current_seed(seed); }
  void set_offset(uint64_t offset) override { host.set_offset(offset); }
  uint64_t get_offset() const override { return host.get_offset(); }
  uint64_t current_seed() const override { return host.current_seed(); }
  uint64_t seed() override { return host.unsafeGetGeneratorImpl()->seed(); }
  void set_state(const c10::TensorImpl& state) override { host.unsafeGetGeneratorImpl()->set_state(state); }
  c10::intrusive_ptr<c10::TensorImpl> get_state() const override { return host.unsafeGetGeneratorImpl()->get_state(); }
  Generator* clone_impl() const override { return new Generator(device().index(), host.clone()); }
};

const at::Generator& default_generator(DeviceIndex index) {
  static auto* all = [] {
    auto* made = new std::vector<at::Generator>;
    for (int i = 0; i < count(); ++i) made->push_back(at::make_generator<Generator>(i));
    return made;
  }();
  index = index < 0 ? current : index;
  check(index);
  return (*all)[index];
}

bool hand_out_defaults = false;  // while torch.npu.default_generators is filled: `torch.Generator` gives these

struct Hooks final : at::PrivateUse1HooksInterface {
  void init() const override { initialize(); }
  bool isBuilt() const override { return true; }
  bool isAvailable() const override { return count() > 0; }
  bool hasPrimaryContext(DeviceIndex) const override { return initialized && !forked; }
  DeviceIndex deviceCount() const override { return count(); }
  void setCurrentDevice(DeviceIndex index) const override { Guard().setDevice(Device(kNpu, index)); }
  DeviceIndex getCurrentDevice() const override { return current; }
  DeviceIndex exchangeDevice(DeviceIndex index) const override {
    return Guard().exchangeDevice(Device(kNpu, index)).index();
  }
  DeviceIndex maybeExchangeDevice(DeviceIndex index) const override { return exchangeDevice(index); }
  Device getDeviceFromPtr(void*) const override { return Device(kNpu, current); }
  bool isPinnedPtr(const void* address) const override { return is_pinned(address); }
  at::Allocator* getPinnedMemoryAllocator() const override {
    TORCH_CHECK(count() > 0, "No NPUs are available");
    return &pinned_allocator;
  }
  const at::Generator& getDefaultGenerator(DeviceIndex index) const override { return default_generator(index); }
  at::Generator getNewGenerator(DeviceIndex index) const override {
    if (hand_out_defaults) return default_generator(index);
    return at::make_generator<Generator>(index < 0 ? current : index);
  }
  void resizePrivateUse1Bytes(const c10::Storage& storage, size_t bytes) const override {
    DeviceIndex before = current;
    current = storage.device().index();
    c10::DataPtr fresh = card_allocator.allocate(bytes);
    current = before;
    if (bytes && storage.nbytes()) std::memcpy(fresh.get(), storage.data(), std::min(bytes, storage.nbytes()));
    storage.unsafeGetStorageImpl()->set_data_ptr_noswap(std::move(fresh));
    storage.unsafeGetStorageImpl()->set_nbytes(bytes);
  }
};

// ------------------------------------------------------------------------------------------------ operators

// What the real one ends its refusals with: "ERR01007 OPS feature not supported" after time and place.
std::string error(const char* code) {
  if (const char* compact = std::getenv("TORCH_NPU_COMPACT_ERROR_OUTPUT"); compact && *compact == '1') return "";
  char now[32];
  const std::time_t seconds = std::time(nullptr);
  std::strftime(now, sizeof now, "%Y-%m-%d-%H:%M:%S", std::localtime(&seconds));
  const char* rank = std::getenv("RANK");
  return std::string("\n[ERROR] ") + now + " (PID:" + std::to_string(getpid()) + ", Device:" + std::to_string(current) +
         ", RankID:" + (rank ? rank : "-1") + ") " + code;
}
constexpr char kNotSupported[] = "ERR01007 OPS feature not supported";

bool first_generation() {
  static const bool yes = [] {
    const char* value = std::getenv("EMULATED_NPU_GENERATION");
    return value && std::string(value) == "1";
  }();
  return yes;
}

void lacks_kernel(const std::string& name) {  // of CANN's, on a first-generation card
  TORCH_CHECK(!first_generation(), name, " or ", name,
              "GetWorkspaceSize not in libopapi.so, or libopapi.so not found.", error("ERR01004 OPS invalid pointer"));
}

bool on_npu(const Tensor& tensor) { return tensor.defined() && tensor.device().type() == kNpu; }

// The same values as a tensor of another device, on a storage that shares the memory.
Tensor dress(const Tensor& tensor, const c10::Storage& storage) {
  DispatchKeySet keys(storage.device().type() == kNpu ? DispatchKey::PrivateUse1 : DispatchKey::CPU);
  keys = keys | (tensor.key_set() & DispatchKeySet({DispatchKey::Conjugate, DispatchKey::Negative}));
  auto made = c10::make_intrusive<c10::TensorImpl>(c10::Storage(storage), keys, tensor.dtype());
  made->set_sizes_and_strides(tensor.sizes(), tensor.strides(), tensor.storage_offset());
  if (tensor.unsafeGetTensorImpl()->is_wrapped_number()) made->set_wrapped_number(true);
  return Tensor(std::move(made));
}

Tensor to_host(const Tensor& tensor) { return dress(tensor, host_storage(tensor.storage())); }

// Of these the host must wait for the result, since its shape or value decides what comes next.
const std::set<std::string> kSynchronize{
    "aten::_local_scalar_dense", "aten::nonzero", "aten::nonzero.out", "aten::masked_select", "aten::masked_select.out",
    "aten::_unique", "aten::_unique2", "aten::unique_dim", "aten::unique_consecutive", "aten::unique_dim_consecutive",
    "aten::equal", "aten::bincount", "aten::repeat_interleave.Tensor"};

// The results of all others are contiguous, whatever the strides of the arguments are.
const std::set<std::string> kKeepStrides{"aten::clone", "aten::empty_strided", "aten::new_empty_strided"};

Op& describe(const OperatorHandle& handle) {
  const c10::FunctionSchema& schema = handle.schema();
  std::lock_guard<std::mutex> lock(counters().mutex);
  std::unique_ptr<Op>& op = counters().ops[&schema];
  if (op) return *op;
  op = std::make_unique<Op>();
  op->name = schema.name() + (schema.overload_name().empty() ? "" : "." + schema.overload_name());
  for (const auto& argument : schema.arguments())
    op->writes.push_back(argument.alias_info() && argument.alias_info()->isWrite());
  for (const auto& result : schema.returns()) op->aliases = op->aliases || result.alias_info();
  op->foreach = schema.name().rfind("aten::_foreach_", 0) == 0;
  if (schema.name() == "aten::_fused_sgd_") op->fused = Fused::kSgd;
  if (schema.name() == "aten::_fused_adamw_") op->fused = Fused::kAdamW;
  for (const char* name :
       {"aten::index", "aten::index_put", "aten::index_put_", "aten::_index_put_impl_", "aten::_unsafe_index"})
    op->indexes = op->indexes || schema.name() == name;
  op->synchronizes = kSynchronize.count(op->name) ||
                     (first_generation() && op->name == "aten::_amp_foreach_non_finite_check_and_unscale_");
  op->keeps_strides = kKeepStrides.count(op->name);
  op->unscales = op->name == "aten::_amp_foreach_non_finite_check_and_unscale_";
  const bool writes = std::find(op->writes.begin(), op->writes.end(), true) != op->writes.end();
  op->computes = op->name.find("empty") == std::string::npos && op->name != "aten::resize_" && (writes || !op->aliases);
  return *op;
}

[[noreturn]] void two_devices(const Op& op, Device a, Device b) {
  TORCH_CHECK(false, "Expected all tensors to be on the same device, but found at least two devices, ",
              a, " and ", b, "! (in ", op.name, ")");
}

struct Alias {
  Tensor npu, host;
  bool written;
};

// One call of an operator: its npu arguments as CPU tensors, and the way back.
struct Call {
  const Op& op;
  DeviceIndex index = -1;
  const Tensor* host = nullptr;  // a host tensor among the arguments that is no mere number
  c10::SmallVector<Alias, 8> aliases;
  c10::SmallVector<std::pair<c10::StorageImpl*, c10::Storage>, 4> storages;  // of host storages, those on the card

  Tensor enter(const Tensor& tensor, bool written, bool listed) {
    if (!tensor.defined()) return tensor;
    Device device = tensor.device();
    if (device.type() != kNpu) {
      if (device.is_cpu() && tensor.dim() && !(op.foreach && !listed)) host = &tensor;
      return tensor;
    }
    if (index >= 0 && index != device.index()) two_devices(op, Device(kNpu, index), device);
    index = device.index();
    aliases.push_back({tensor, to_host(tensor), written});
    return aliases.back().host;
  }

  void enter(IValue& value, bool written) {
    if (value.isTensor()) {
      if (!value.toTensor().defined()) return;
      value = IValue(enter(value.toTensor(), written, false));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      list.reserve(value.toListRef().size());
      for (const IValue& item : value.toListRef()) list.push_back(enter(item.toTensor(), written, true));
      value = IValue(std::move(list));
    } else if (value.isOptionalTensorList()) {
      c10::List<std::optional<Tensor>> list;
      for (const IValue& item : value.toListRef())
        list.push_back(item.isTensor() ? std::optional<Tensor>(enter(item.toTensor(), written, true)) : std::nullopt);
      value = IValue(std::move(list));
    } else if (value.isStorage() && value.toStorage().device().type() == kNpu) {
      c10::Storage card = value.toStorage();
      storages.emplace_back(host_storage(card).unsafeGetStorageImpl(), card);
      value = IValue(host_storage(card));
    } else if (value.isDevice() && value.toDevice().type() == kNpu) {
      index = Guard::full(value.toDevice()).index();
      check(index);
      initialize();
      value = IValue(Device(c10::kCPU));
    }
  }

  // The card's storage of a host one: an argument's, or one that came out before, or a new one around fresh memory.
  c10::Storage on_card(const c10::Storage& host) {
    if (host.use_count() > 1) {
      for (const Alias& alias : aliases)
        if (host.is_alias_of(host_storage(alias.npu.storage()))) return alias.npu.storage();
      for (const auto& [known, card] : storages)
        if (host.unsafeGetStorageImpl() == known) return card;
    }
    storages.emplace_back(host.unsafeGetStorageImpl(), card_storage(host, index < 0 ? current : index));
    return storages.back().second;
  }

  bool is_fresh(const c10::Storage& host) {
    for (const Alias& alias : aliases)
      if (host.is_alias_of(host_storage(alias.npu.storage()))) return false;
    for (const auto& [known, card] : storages)
      if (host.unsafeGetStorageImpl() == known) return false;
    return true;
  }

  Tensor leave(const Tensor& tensor) {
    if (!tensor.defined()) return tensor;
    if (op.aliases)
      for (const Alias& alias : aliases)
        if (alias.host.is_same(tensor)) return alias.npu;
    if (!tensor.device().is_cpu() || !tensor.has_storage()) return tensor;
    if (!op.keeps_strides && !tensor.is_contiguous() && is_fresh(tensor.storage())) {
      Tensor contiguous = at::_ops::contiguous::call(tensor, c10::MemoryFormat::Contiguous);
      return dress(contiguous, on_card(contiguous.storage()));
    }
    c10::Storage card = on_card(tensor.storage());
    if (c10::InferenceMode::is_enabled())
      for (const Alias& alias : aliases)
        if (card.is_alias_of(alias.npu.storage()) && !alias.npu.is_inference()) {
          c10::InferenceMode ordinary(false);  // a view of an ordinary tensor, such as a weight, is ordinary too
          return dress(tensor, card);
        }
    return dress(tensor, card);
  }

  void leave(IValue& value) {
    if (value.isTensor()) {
      value = IValue(leave(value.toTensor()));
    } else if (value.isTensorList()) {
      c10::List<Tensor> list;
      for (const IValue& item : value.toListRef()) list.push_back(leave(item.toTensor()));
      value = IValue(std::move(list));
    }
  }

  void write_back() {  // resize_, set_, transpose_ and `out=` change more than an argument's values
    for (const Alias& alias : aliases) {
      if (!alias.written) continue;
      auto *npu = alias.npu.unsafeGetTensorImpl(), *host = alias.host.unsafeGetTensorImpl();
      if (!host->storage().is_alias_of(host_storage(npu->storage())))
        npu->set_storage_keep_dtype(on_card(host->storage()));
      auto* storage = npu->storage().unsafeGetStorageImpl();
      if (storage->data() != host->storage().data() || storage->nbytes() != host->storage().nbytes()) {
        storage->set_data_ptr_noswap(::on_card(host->storage(), storage->device().index()));
        storage->set_nbytes(host->storage().nbytes());
      }
      if (npu->sizes() != host->sizes() || npu->strides() != host->strides() ||
          npu->storage_offset() != host->storage_offset())
        npu->set_sizes_and_strides(host->sizes(), host->strides(), host->storage_offset());
    }
  }
};

struct CurrentDevice {  // an operator allocates where its tensors are
  DeviceIndex before = current;
  explicit CurrentDevice(DeviceIndex index) { current = index; }
  ~CurrentDevice() { current = before; }
};

bool selects_by_mask(const Stack& stack, size_t first, size_t arguments) {
  if (arguments > 2 && stack[first + 2].isTensor()) {  // x[mask] = number is a masked fill
    const Tensor& value = stack[first + 2].toTensor();
    if (value.numel() == 1 && value.device().is_cpu()) return false;
  }
  for (const IValue& item : stack[first + 1].toListRef()) {
    if (!item.isTensor()) continue;
    const at::ScalarType dtype = item.toTensor().scalar_type();
    if (dtype == at::kBool || dtype == at::kByte) return true;
  }
  return false;
}

bool is_channels_last(std::optional<c10::MemoryFormat> format) {
  return format == c10::MemoryFormat::ChannelsLast || format == c10::MemoryFormat::ChannelsLast3d;
}

// clone takes channels_last and makes a contiguous tensor; empty refuses it.
void settle_memory_format(const Op& op, IValue& value) {
  if (value.isNone() || !is_channels_last(value.toMemoryFormat())) return;
  TORCH_CHECK(op.name != "aten::empty.memory_format",
              "Only c10::MemoryFormat::Contiguous is supported for creating a npu tensor", error(kNotSupported));
  if (op.name == "aten::clone") value = IValue(c10::MemoryFormat::Contiguous);
}

double read(const Tensor& tensor) { return at::_ops::item::call(tensor).toDouble(); }  // the host waits

// What the real ones of the fused optimizers make of their arguments; false where there is nothing to be done.
bool settle_fused(Op& op, const OperatorHandle& handle, Stack* stack, size_t first) {
  auto argument = [&](const char* name) -> IValue& {
    return (*stack)[first + static_cast<size_t>(*handle.schema().argumentIndexWithName(name))];
  };
  if (op.fused == Fused::kAdamW) {  // a loop over the parameters, which looks at neither scale nor flag
    lacks_kernel("aclnnApplyAdamWV2");
    argument("grad_scale") = argument("found_inf") = IValue();
    for (const Tensor& step : argument("state_steps").toTensorVector()) at::_ops::sub_Scalar::call(step, 1, 1);
    op.count += static_cast<long>(argument("self").toListRef().size()) - 1;
    return true;
  }
  if (argument("found_inf").isTensor() && read(argument("found_inf").toTensor()) == 1) return false;
  const double momentum = argument("momentum").toDouble();
  TORCH_CHECK(momentum > 0, "momentum must be positive, but got ", momentum);
  lacks_kernel("aclnnFusedSgd");
  if (argument("lr").isTensor()) read(argument("lr").toTensor());
  return true;
}

std::atomic<bool> overflow{false};  // of a first-generation card, raised by what saturates

// What a first-generation card leaves of numbers that are not finite: the largest number, and 0 for NaN.
void saturate(const Tensor& tensor) {
  if (!tensor.defined() || !tensor.is_floating_point() || !tensor.numel()) return;
  if (at::_ops::all::call(at::_ops::isfinite::call(tensor)).item<bool>()) return;
  overflow = true;
  at::_ops::nan_to_num_::call(const_cast<Tensor&>(tensor), 0.0, std::nullopt, std::nullopt);
}

void saturate(const IValue& value) {
  if (value.isTensor()) saturate(value.toTensor());
  if (value.isTensorList())
    for (const Tensor& tensor : value.toTensorVector()) saturate(tensor);
}

// Any operator: the CPU's kernel on the same memory.
void run(const OperatorHandle& handle, Stack* stack) {
  Op& op = describe(handle);
  ++op.count;
  const auto& arguments = handle.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  if (op.fused != Fused::kNot && !settle_fused(op, handle, stack, first)) {
    torch::jit::drop(*stack, arguments.size());
    return;
  }
  Call call{op};
  int generator = -1;
  if (op.synchronizes) synchronization(op.name);
  if (op.foreach && first_generation()) op.count += static_cast<long>((*stack)[first].toListRef().size()) - 1;  // a loop
  if (op.indexes && selects_by_mask(*stack, first, arguments.size())) synchronization("aten::nonzero");
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = (*stack)[first + i];
    if (value.isGenerator() || (value.isNone() && arguments[i].name() == "generator"))
      generator = static_cast<int>(first + i);
    if (value.isBool() && value.toBool() && arguments[i].name() == "pin_memory")
      TORCH_CHECK(false, "Only dense CPU tensors can be pinned");
    if (arguments[i].name() == "memory_format") settle_memory_format(op, value);
    call.enter(value, op.writes[i]);
  }
  if (call.host && call.index >= 0) {
    if (!op.indexes) two_devices(op, Device(kNpu, call.index), call.host->device());
    synchronization("blocking h2d copy");
    copied("h2d", false, call.host->nbytes());
  }
  CurrentDevice device(call.index < 0 ? current : call.index);
  if (generator >= 0) {
    IValue& value = (*stack)[generator];
    at::Generator given = value.isNone() ? default_generator(current) : value.toGenerator();
    TORCH_CHECK(given.device().type() == kNpu, "Expected a 'npu' device type for generator but found '",
                given.device(), "'");
    value = IValue(static_cast<Generator*>(given.unsafeGetGeneratorImpl())->host);
  }
  {
    c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
    const std::optional<Tensor> found =
        op.unscales && first_generation() ? std::optional((*stack)[first + 1].toTensor()) : std::nullopt;
    handle.redispatchBoxed(DispatchKeySet(DispatchKey::CPU), stack);
    if (found && overflow.exchange(false)) at::_ops::fill__Scalar::call(const_cast<Tensor&>(*found), 1.0);
    if (op.computes && first_generation()) {
      for (const auto& alias : call.aliases)
        if (alias.written) saturate(alias.host);
      for (size_t i = stack->size() - handle.schema().returns().size(); i < stack->size(); ++i) saturate((*stack)[i]);
    }
  }
  call.write_back();
  for (size_t i = stack->size() - handle.schema().returns().size(); i < stack->size(); ++i) call.leave((*stack)[i]);
}

// _copy_from(self, dst, non_blocking): every copy from, to or between cards comes here.
void copy_from(const OperatorHandle& handle, Stack* stack) {
  ++describe(handle).count;
  const bool non_blocking = torch::jit::pop(*stack).toBool();
  Tensor to = torch::jit::pop(*stack).toTensor(), from = torch::jit::pop(*stack).toTensor();
  if (from.numel()) {
    if (on_npu(from) && on_npu(to)) {
      copied("d2d", false, from.nbytes());
    } else {
      const Tensor& host = on_npu(from) ? to : from;
      const char* kind = on_npu(from) ? "d2h" : "h2d";
      const bool free = non_blocking && is_pinned(host.storage().data());
      copied(kind, free, from.nbytes());
      if (!free) synchronization(std::string("blocking ") + kind + " copy");
    }
  }
  c10::impl::ExcludeDispatchKeyGuard no_autocast(c10::autocast_dispatch_keyset);
  Tensor target = on_npu(to) ? to_host(to) : to;
  at::_ops::copy_::call(target, on_npu(from) ? to_host(from) : from, false);
  stack->emplace_back(std::move(to));
}

Tensor contiguous(const Tensor& self, c10::MemoryFormat format) {
  if (self.is_contiguous(format)) return self;
  TORCH_CHECK(format == c10::MemoryFormat::Contiguous,
              "NPU contiguous operator only supported contiguous memory format.", error(kNotSupported));
  return at::_ops::clone::call(self, format);
}

Tensor empty_like(
    const Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin_memory, std::optional<c10::MemoryFormat> format) {
  if (is_channels_last(format)) format = c10::MemoryFormat::Contiguous;  // taken, and without effect
  return at::native::empty_like(self, dtype, layout, device, pin_memory, format);
}

Tensor to_copy(
    const Tensor& self, std::optional<at::ScalarType> dtype, std::optional<at::Layout> layout,
    std::optional<Device> device, std::optional<bool> pin_memory, bool non_blocking,
    std::optional<c10::MemoryFormat> format) {
  TORCH_CHECK(!is_channels_last(format), "Only contiguous_format or preserve_format is supported.",
              error(kNotSupported));
  return at::native::_to_copy(self, dtype, layout, device, pin_memory, non_blocking, format);
}

// torch has a kernel of its own for dropout on PrivateUse1, which rounds otherwise: this is the CPU's recipe.
void dropout(const OperatorHandle& handle, Stack* stack) {
  const bool train = torch::jit::pop(*stack).toBool();
  const double p = torch::jit::pop(*stack).toDouble();
  Tensor input = torch::jit::pop(*stack).toTensor();
  TORCH_CHECK(p >= 0 && p <= 1, "dropout probability has to be between 0 and 1, but got ", p);
  if (p > 0 && train && input.numel()) {
    ++describe(handle).count;
    if (p == 1) {
      input = at::_ops::mul_Scalar::call(input, 0);
    } else {
      Tensor noise = at::_ops::empty_like::call(input, {}, {}, {}, {}, {});
      at::_ops::div__Scalar::call(at::_ops::bernoulli__float::call(noise, 1 - p, {}), 1 - p);
      input = at::_ops::mul_Tensor::call(input, noise);
    }
  }
  stack->emplace_back(std::move(input));
}

void nothing(const OperatorHandle& handle, Stack* stack) {
  torch::jit::drop(*stack, handle.schema().arguments().size());
}

// emulated_npu::host(Tensor) -> Tensor is a CPU tensor on an npu tensor's memory, ::card(Tensor, int) the way back.
void host(const OperatorHandle&, Stack* stack) {
  Tensor tensor = torch::jit::pop(*stack).toTensor();
  stack->emplace_back(on_npu(tensor) ? to_host(tensor) : tensor);
}
// ::change_data_ptr(Tensor, Tensor from, int index): the storage of one lies in that of another, from an element on.
void change_data_ptr(const OperatorHandle&, Stack* stack) {
  const int64_t index = torch::jit::pop(*stack).toInt();
  Tensor from = torch::jit::pop(*stack).toTensor(), tensor = torch::jit::pop(*stack).toTensor();
  auto* storage = tensor.storage().unsafeGetStorageImpl();
  auto* whole = new c10::Storage(host_storage(from.storage()));
  char* data = static_cast<char*>(whole->mutable_data()) + index * static_cast<int64_t>(from.element_size());
  c10::DataPtr part(
      data, whole, [](void* pointer) { delete static_cast<c10::Storage*>(pointer); }, Device(c10::kCPU));
  c10::Storage host = c10::make_intrusive<c10::StorageImpl>(
      c10::StorageImpl::use_byte_size_t(), storage->nbytes(), std::move(part), nullptr, false);
  auto* block = new Block{std::move(host), 0, storage->device().index()};
  storage->set_data_ptr_noswap({data, block, &release, storage->device()});
}
void card(const OperatorHandle&, Stack* stack) {
  const auto index = static_cast<DeviceIndex>(torch::jit::pop(*stack).toInt());
  Tensor tensor = torch::jit::pop(*stack).toTensor();
  stack->emplace_back(dress(tensor, card_storage(tensor.storage(), index)));
}

// ------------------------------------------------------------------------------------------------ autocast

enum class Cast { kLow, kFloat, kWidest };

// The operators that the real torch_npu registers for autocast, by what becomes of their floating-point arguments.
const std::vector<const char*> kLow{
    "_convolution.deprecated", "_convolution", "conv1d", "conv2d", "conv3d", "conv_tbc", "conv_transpose1d",
    "conv_transpose2d.input", "conv_transpose3d.input", "convolution", "prelu", "addmm", "addmv", "addr", "matmul",
    "einsum", "mm", "mv", "linear", "addbmm", "baddbmm", "bmm", "chain_matmul", "linalg_multi_dot",
    "_thnn_fused_lstm_cell", "_thnn_fused_gru_cell", "lstm_cell", "gru_cell", "rnn_tanh_cell", "rnn_relu_cell",
    "_scaled_dot_product_flash_attention", "scaled_dot_product_attention"};
const std::vector<const char*> kFloat{
    "acos", "asin", "cosh", "erfinv", "exp", "expm1", "log", "log10", "log2", "log1p", "reciprocal", "rsqrt", "sinh",
    "tan", "pow.Tensor_Scalar", "pow.Tensor_Tensor", "pow.Scalar", "softplus", "layer_norm", "native_layer_norm",
    "group_norm", "frobenius_norm.dim", "nuclear_norm", "nuclear_norm.dim", "cosine_similarity", "poisson_nll_loss",
    "cosine_embedding_loss", "nll_loss", "nll_loss2d", "hinge_embedding_loss", "kl_div", "l1_loss", "smooth_l1_loss",
    "huber_loss", "mse_loss", "margin_ranking_loss", "multilabel_margin_loss", "soft_margin_loss",
    "triplet_margin_loss", "multi_margin_loss", "binary_cross_entropy_with_logits", "dist", "pdist", "cdist",
    "renorm", "logsumexp", "norm.Scalar", "norm.ScalarOpt_dim",
    // these unless their `dtype` is given
    "prod", "prod.dim_int", "softmax.int", "log_softmax.int", "cumprod", "cumsum", "linalg_vector_norm",
    "linalg_matrix_norm", "linalg_matrix_norm.str_ord", "sum", "sum.dim_IntList"};
const std::vector<const char*> kWidest{
    "addcdiv", "addcmul", "atan2", "bilinear", "cross", "dot", "grid_sampler", "index_put", "tensordot",
    "scatter_add"};

bool castable(const Tensor& tensor) {
  return on_npu(tensor) && at::isFloatingType(tensor.scalar_type()) && tensor.scalar_type() != at::kDouble;
}

template <class F>
void each_tensor(IValue& value, F change) {
  if (value.isTensor()) {
    if (castable(value.toTensor())) value = IValue(change(value.toTensor()));
  } else if (value.isTensorList()) {
    c10::List<Tensor> list;
    for (const IValue& item : value.toListRef())
      list.push_back(castable(item.toTensor()) ? change(item.toTensor()) : item.toTensor());
    value = IValue(std::move(list));
  }
}

template <Cast kind>
void autocast(const OperatorHandle& handle, Stack* stack) {
  c10::impl::ExcludeDispatchKeyGuard no_autocast(DispatchKey::AutocastPrivateUse1);
  const auto& arguments = handle.schema().arguments();
  const size_t first = stack->size() - arguments.size();
  at::ScalarType to = kind == Cast::kFloat ? at::kFloat : at::autocast::get_autocast_dtype(kNpu);
  bool change = true;
  for (size_t i = 0; i < arguments.size(); ++i) {
    IValue& value = (*stack)[first + i];
    if (kind == Cast::kFloat && arguments[i].name() == "dtype" && !value.isNone()) change = false;
    if (kind == Cast::kWidest)
      each_tensor(value, [&](const Tensor& tensor) {
        if (tensor.scalar_type() == at::kFloat) to = at::kFloat;
        return tensor;
      });
  }
  if (change)
    for (size_t i = first; i < stack->size(); ++i)
      each_tensor((*stack)[i], [&](const Tensor& tensor) { return at::autocast::cached_cast(to, tensor, kNpu); });
  handle.callBoxed(stack);
}

void refuse_binary_cross_entropy(const OperatorHandle&, Stack*) {
  TORCH_CHECK(false, "binary_cross_entropy is unsafe to autocast: use binary_cross_entropy_with_logits");
}

// ------------------------------------------------------------------------------------------------ registration

template <void (*kernel)(const OperatorHandle&, Stack*)>
torch::CppFunction boxed() {
  return torch::CppFunction::makeFromBoxedFunction<kernel>();
}

torch::Library& library(torch::Library::Kind kind, const char* ns, std::optional<DispatchKey> key) {
  return *new torch::Library(kind, ns, key, __FILE__, __LINE__);  // never destroyed: that would deregister
}

void register_operators() {
  constexpr auto kImpl = torch::Library::IMPL;
  library(kImpl, "_", DispatchKey::PrivateUse1).fallback(boxed<&run>());
  library(kImpl, "_", DispatchKey::AutocastPrivateUse1).fallback(torch::CppFunction::makeFallthrough());

  // Whatever the CPU has a kernel for the npu has one for too, and so does not decompose otherwise than the CPU. The
  // foreach and convolution kernels are everybody's: without these lines they would ask what an npu is.
  auto& aten = library(kImpl, "aten", DispatchKey::PrivateUse1);
  std::set<c10::OperatorName, bool (*)(const c10::OperatorName&, const c10::OperatorName&)> names(
      [](const c10::OperatorName& a, const c10::OperatorName& b) {
        return std::tie(a.name, a.overload_name) < std::tie(b.name, b.overload_name);
      });
  const std::set<std::string> everybodys{"aten::convolution", "aten::convolution_backward"};
  const std::set<std::string> composite{"aten::_foreach_copy", "aten::_foreach_copy_"};  // its parts count as copies
  const std::set<std::string> own{"aten::_copy_from", "aten::record_stream", "aten::dropout"};
  for (const auto& name : c10::Dispatcher::singleton().getRegistrationsForDispatchKey(DispatchKey::CPU))
    if (name.name.rfind("aten::", 0) == 0) names.insert(name);
  for (const auto& name : c10::Dispatcher::singleton().getAllOpNames())
    if (name.name.rfind("aten::_foreach_", 0) == 0 || everybodys.count(name.name)) names.insert(name);
  for (const auto& name : names) {
    if (composite.count(name.name) || own.count(name.name)) continue;
    auto handle = c10::Dispatcher::singleton().findSchema(name);
    if (!handle) continue;
    aten.impl((name.overload_name.empty() ? name.name : name.name + "." + name.overload_name).c_str(), boxed<&run>());
  }
  aten.impl("_copy_from", boxed<&copy_from>());
  aten.impl("_to_copy", TORCH_FN(to_copy));
  aten.impl("contiguous", TORCH_FN(contiguous));
  aten.impl("empty_like", TORCH_FN(empty_like));
  aten.impl("record_stream", boxed<&nothing>());
  aten.impl("dropout", boxed<&dropout>());
  auto& autograd = library(kImpl, "aten", DispatchKey::AutogradPrivateUse1);
  autograd.impl("contiguous", torch::CppFunction::makeFallthrough());  // the clone in it is differentiated
  autograd.impl("dropout", boxed<&dropout>());

  auto& autocasts = library(kImpl, "aten", DispatchKey::AutocastPrivateUse1);
  for (const char* name : kLow) autocasts.impl(name, boxed<&autocast<Cast::kLow>>());
  for (const char* name : kFloat) autocasts.impl(name, boxed<&autocast<Cast::kFloat>>());
  for (const char* name : kWidest) autocasts.impl(name, boxed<&autocast<Cast::kWidest>>());
  autocasts.impl("binary_cross_entropy", boxed<&refuse_binary_cross_entropy>());

  auto& own_ops = library(torch::Library::FRAGMENT, "emulated_npu", std::nullopt);
  own_ops.def("host(Tensor tensor) -> Tensor", boxed<&host>());
  own_ops.def("card(Tensor tensor, int index) -> Tensor", boxed<&card>());
  own_ops.def("change_data_ptr(Tensor tensor, Tensor source, int index) -> ()", boxed<&change_data_ptr>());
}

Guard guard;
Hooks hooks;

std::string quoted(const std::string& text) {  // of names that hold neither quotes nor backslashes
  return "\"" + text + "\"";
}

std::string object(const std::map<std::string, long>& values) {
  std::string text;
  for (const auto& [key, value] : values)
    text += (text.empty() ? "" : ", ") + quoted(key) + ": " + std::to_string(value);
  return "{" + text + "}";
}
}  // namespace

// ------------------------------------------------------------------------------------------------ called by Python

extern "C" {
void emulated_npu_register() {
  c10::impl::registerDeviceGuard(kNpu, &guard);
  at::RegisterPrivateUse1HooksInterface(&hooks);
  c10::SetAllocator(kNpu, &card_allocator);
  pthread_atfork(nullptr, nullptr, [] { forked = initialized; });
  register_operators();
  c10d::TimerRegistry()->Register(kNpu, [](Device) {  // or DDP would warn
    return c10d::TimerRegistry()->Create(c10::kCPU, Device(c10::kCPU));
  });
}
int emulated_npu_count() { return count(); }
int emulated_npu_initialized() { return initialized && !forked; }
int emulated_npu_forked() { return forked; }
void emulated_npu_initialize() { initialized = true; }
int emulated_npu_overflow() { return overflow; }
void emulated_npu_clear_overflow() { overflow = false; }
void emulated_npu_hand_out_defaults(int yes) { hand_out_defaults = yes; }
long emulated_npu_allocated(int index) { return allocated[index]; }
long emulated_npu_peak(int index) { return peak[index]; }
void emulated_npu_reset_peak(int index) { peak[index] = allocated[index].load(); }
void emulated_npu_set_up(const char* call) { set_up(call); }
void emulated_npu_trace(void (*function)(const char*, const char*)) { tracer = function; }
const char* emulated_npu_snapshot() {
  static thread_local std::string text;
  std::lock_guard<std::mutex> lock(counters().mutex);
  std::map<std::string, long> ops;
  for (const auto& [schema, op] : counters().ops)
    if (op->count) ops[op->name] += op->count;
  std::string setup;
  for (const std::string& call : counters().setup) setup += (setup.empty() ? "" : ", ") + quoted(call);
  text = "{\"ops\": " + object(ops) + ", \"copies\": " + object(counters().copies) +
         ", \"synchronizations\": " + object(counters().synchronizations) + ", \"setup\": [" + setup + "]}";
  return text.c_str();
}
}

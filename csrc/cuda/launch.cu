// How many blocks of how many threads, and whose memory: decided from sizes and options alone, so that
// nothing waits for the device.
#include <algorithm>
#include <cmath>

#include "../plan.h"
#include "grid.cuh"
#include "launch.cuh"

namespace pck::cuda {
namespace {

// A row's range over its standard deviation decides how many cells it needs. Few rows exceed the first
// of these; room up to the second is cheap enough to have. A row that needs more closes its gaps, or is
// summed pair by pair.
constexpr double kUsualDeviations = 10.0;
constexpr double kRoomyDeviations = 16.0;
constexpr double kMostCells = 1 << 15;
constexpr double kCellsOfNearlyHardRows = 1024;

// Room on the grid, in cells, a multiple of 4: with less than `least` most rows would be summed pair by
// pair, and more than `most` is not worth its memory.
struct Room {
  int least, most;
};

Room grid_room(int64_t count, const RankOptions& options) {
  const auto whole = [](double cells) {
    return std::max(kFewestCells, (static_cast<int>(cells) + 3) / 4 * 4);
  };
  const double points = static_cast<double>(count);
  const int inverse_step =
      visit(Relaxations{}, options.relaxation, [](auto row) { return decltype(row)::inverse_step; });
  // A larger grid costs more than summing pairs, or more memory than it is worth.
  const double limit = std::min({kMostCellsPerPoint * points, points * points / 8.0, kMostCells});
  if (!options.scale_std) return {kFewestCells, whole(std::min(2.0 * points, limit))};
  const double deviation = inverse_step / options.temperature;
  if (kUsualDeviations * deviation > limit)
    return {kFewestCells, whole(std::min(kCellsOfNearlyHardRows, limit))};
  return {whole(kUsualDeviations * deviation), whole(std::min(kRoomyDeviations * deviation, limit))};
}

// A thread for every four points, so that it has several loads in flight, but at least a warp. More
// threads where a row takes so much shared memory that few blocks run side by side.
int block_threads(int64_t count, int64_t shared_bytes, int shared_most, int most) {
  const int64_t side_by_side = std::max<int64_t>(shared_most / shared_bytes, 1);
  int threads = kWarp;
  const auto too_few = [&] {
    return (4 * threads < count && threads < 512) ||
           (threads < count && threads * side_by_side < kMostThreads);
  };
  while (2 * threads <= std::min(kThreads<true>, most) && too_few()) threads *= 2;
  return threads;
}

}  // namespace

cudaError_t plan_launch(int64_t rows, int64_t count, const RankOptions* options, Launch* launch) {
  int device = 0, shared_most = 0, processors = 0, threads_most = 0;
  for (const cudaError_t error :
       {cudaGetDevice(&device),
        cudaDeviceGetAttribute(&shared_most, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        cudaDeviceGetAttribute(&threads_most, cudaDevAttrMaxThreadsPerBlock, device)})
    if (error != cudaSuccess) return error;
  constexpr int64_t header = sizeof(Header);
  const Room room = options == nullptr ? Room{0, 0} : grid_room(count, *options);
  Layout layout{static_cast<int>(count), room.most};
  if (header + layout.bytes() > shared_most) {
    const int64_t left = shared_most - header - Layout{layout.count, 0}.bytes();
    const int64_t fitting = left / Layout::kCellBytes / 4 * 4;
    if (fitting >= room.least) layout.cells = static_cast<int>(std::min<int64_t>(fitting, room.most));
  }
  const bool in_shared = header + layout.bytes() <= shared_most;
  // Working memory in global memory is only for as many blocks as run at a time.
  const int64_t blocks = std::min<int64_t>(rows, in_shared ? 0x7fffffff : processors);
  const int64_t shared_bytes = header + (in_shared ? layout.bytes() : 0);
  *launch = {rows,
             layout.count,
             layout.cells,
             static_cast<int>(blocks),
             in_shared ? block_threads(count, shared_bytes, shared_most, threads_most)
                       : std::min(kThreads<false>, threads_most),
             in_shared,
             shared_bytes,
             shared_most,
             in_shared ? 0 : blocks * layout.bytes()};
  return cudaSuccess;
}

}  // namespace pck::cuda

// How many blocks of how many threads, and whose memory: decided from sizes and options alone, so that
// nothing waits for the device.
#include <algorithm>
#include <cmath>

#include "launch.cuh"
#include "soft_rank.cuh"

namespace pck::cuda {
namespace {

constexpr double kUsualDeviations = 24.0;  // a row's range over its standard deviation, with room
constexpr int kMostCells = 1 << 15;
constexpr int kCellsOfNearlyHardRows = 1024;

// Room on the grid for the rows that these options let expect. Rows that need more close their gaps or
// go pair by pair.
int grid_cells(int64_t count, const RankOptions& options) {
  const double points = static_cast<double>(count);
  const int inverse_step = options.relaxation == Relaxation::logistic
                               ? Relax<Relaxation::logistic>::inverse_step
                               : Relax<Relaxation::normal>::inverse_step;
  // More than this costs more than pairs, or more memory than it is worth.
  const double most = std::min({8.0 * points, points * points / 8.0, double{kMostCells}});
  const double expected =
      options.scale_std ? kUsualDeviations * inverse_step / options.temperature : 2.0 * points;
  const double room = expected <= most ? expected : std::min<double>(most, kCellsOfNearlyHardRows);
  return std::max(kFewestCells, (static_cast<int>(room) + 3) / 4 * 4);
}

// Four points a thread, to have loads in flight; a warp for the shortest rows.
int block_threads(int64_t count, int most) {
  const int wanted = count > 4096 ? kThreads<true> : 512;
  int threads = kWarp;
  while (threads < count / 4 && threads < std::min(wanted, most)) threads *= 2;
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
  const int cells = options == nullptr ? 0 : grid_cells(count, *options);
  const Layout layout{static_cast<int>(count), cells};
  const int64_t header = sizeof(Header);
  const bool in_shared = header + layout.bytes() <= shared_most;
  // Working memory that is not shared is kept to what runs at a time.
  const int64_t blocks = std::min<int64_t>(rows, in_shared ? 0x7fffffff : processors);
  *launch = {rows,
             layout.count,
             cells,
             static_cast<int>(blocks),
             in_shared ? block_threads(count, threads_most) : std::min(kThreads<false>, threads_most),
             in_shared,
             header + (in_shared ? layout.bytes() : 0),
             in_shared ? 0 : blocks * layout.bytes()};
  return cudaSuccess;
}

}  // namespace pck::cuda

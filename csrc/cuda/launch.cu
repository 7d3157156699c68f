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
// sorted and goes in parts, for which a grid must be some supports wide (nearly_hard.cuh).
constexpr double kUsualDeviations = 10.0;
constexpr double kRoomyDeviations = 16.0;
constexpr double kCellsOfNearlyHardRows = 1024;
constexpr double kCellsOfParts = 256;
constexpr double kCellsOfFarParts = 512;

constexpr int64_t kHeader = sizeof(Header);

// Room on the grid, in cells, a multiple of 4: with less than `least` most rows would be nearly hard,
// and more than `most` is not worth its memory.
struct Room {
  int least, most;
};

// `capacity`: the most cells that there is memory for.
Room grid_room(int64_t count, const Needs& needs, double capacity) {
  const RankOptions& options = *needs.options;
  const double points = static_cast<double>(count);
  const double parts = needs.weighted ? kCellsOfFarParts : kCellsOfParts;
  const int fewest = needs.weighted ? kFewestFarCells : kFewestCells;
  const int inverse_step = visit(GridRelaxations{}, options.relaxation,
                                 [](auto row) { return decltype(row)::inverse_step; });
  // A larger grid costs more than parts.
  const double limit = std::min({kMostCellsPerPoint * points, points * points / 8.0, capacity});
  const auto whole = [=](double cells) {
    const double wanted = std::min(std::max(cells, parts), limit);
    return std::max(fewest, (static_cast<int>(wanted) + 3) / 4 * 4);
  };
  if (!options.scale_std) return {whole(0.0), whole(2.0 * points)};
  const double deviation = inverse_step / options.temperature;
  if (kUsualDeviations * deviation > limit) return {whole(0.0), whole(kCellsOfNearlyHardRows)};
  return {whole(kUsualDeviations * deviation), whole(kRoomyDeviations * deviation)};
}

// The device's shared memory, in bytes.
struct Shared {
  int block;     // that one block may have
  int whole;     // of a multiprocessor
  int reserved;  // beside what a block asks for

  // What a block may have if so many run side by side.
  int64_t each(int blocks) const { return std::min(block, whole / blocks - reserved); }
};

int64_t shared_of(const Layout& layout, bool points) {
  return kHeader + layout.cell_bytes() + (points ? layout.point_bytes() : 0);
}

// Where the references' arrays go, and room on the grid: returns whether they fit into shared memory.
// Two blocks on a multiprocessor hide each other's barriers: if half of its memory has room for all
// that a row might use, so be it. Else places take the room of values, and the grid has what is left,
// of half or all of the memory; or it has all, and the references' arrays are in global memory. Where
// points are weighted, places never take the room of values.
bool fit(Layout& layout, const Room& room, const Shared& shared) {
  layout.cells = room.most;
  layout.apart = room.most > 0;
  if (shared_of(layout, true) <= shared.each(2)) return true;
  layout.cells = room.least;
  layout.apart = layout.weighted;
  const int64_t least = shared_of(layout, true);
  const bool in_shared = least <= shared.block;
  const int64_t bytes = shared.each(in_shared && least <= shared.each(2) ? 2 : 1);
  const int64_t left = bytes - kHeader - (in_shared ? layout.point_bytes() : 0);
  const int64_t fitting = left / layout.bytes_a_cell() / 4 * 4;
  layout.cells = static_cast<int>(std::min<int64_t>(room.most, fitting));
  return in_shared;
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

cudaError_t plan_launch(int64_t rows, int64_t count, const Needs& needs, Launch* launch) {
  int device = 0, processors = 0, threads_most = 0;
  Shared shared{};
  for (const cudaError_t error :
       {cudaGetDevice(&device),
        cudaDeviceGetAttribute(&shared.block, cudaDevAttrMaxSharedMemoryPerBlockOptin, device),
        cudaDeviceGetAttribute(&shared.whole, cudaDevAttrMaxSharedMemoryPerMultiprocessor, device),
        cudaDeviceGetAttribute(&shared.reserved, cudaDevAttrReservedSharedMemoryPerBlock, device),
        cudaDeviceGetAttribute(&processors, cudaDevAttrMultiProcessorCount, device),
        cudaDeviceGetAttribute(&threads_most, cudaDevAttrMaxThreadsPerBlock, device)})
    if (error != cudaSuccess) return error;
  Layout layout{needs.arrays ? static_cast<int>(count) : 0, 0, needs.masked, false, needs.weighted};
  const int64_t cell_bytes = layout.bytes_a_cell();
  const int fewest = needs.weighted ? kFewestFarCells : kFewestCells;
  if (shared.block < kHeader + fewest * cell_bytes) return cudaErrorInvalidValue;
  const double capacity = static_cast<double>((shared.block - kHeader) / cell_bytes);
  const int own = static_cast<int>((needs.shared_bytes + cell_bytes - 1) / cell_bytes);
  const Room room = needs.options == nullptr ? Room{own, own} : grid_room(count, needs, capacity);
  const bool in_shared = fit(layout, room, shared);
  const int64_t shared_bytes = shared_of(layout, in_shared);
  // Working memory in global memory is only for as many blocks as run at a time.
  const int64_t blocks = std::min<int64_t>(rows, in_shared ? kMostBlocks : processors);
  *launch = {rows,
             layout.count,
             layout.cells,
             layout.masked,
             layout.apart,
             layout.weighted,
             static_cast<int>(blocks),
             in_shared ? block_threads(count, shared_bytes, shared.block, threads_most)
                       : std::min(kThreads<false>, threads_most),
             in_shared,
             shared_bytes,
             shared.block,
             in_shared ? 0 : blocks * layout.point_bytes()};
  return cudaSuccess;
}

}  // namespace pck::cuda

// AMX: the tile product where the machine has matrix registers, and the operating system lets them be used.
#pragma once

#include "tile_product.h"

namespace micromix {

// x_tiles: 1 or 2. Only where amx_permitted().
void amx_tile_product(const TileProduct& product, int x_tiles);

}  // namespace micromix

#pragma once

#include "pellucid.h"

namespace pld {

pld_cpu_info detect_cpu();

}  // namespace pld

// The checks of csrc/direction.h for CUDA: launch.h says first what torch's headers are to declare.
#pragma once

#include "launch.h"

#include "../direction.h"

// What the tests in this folder know of the kernels.
#pragma once

#include "attention.h"
#include "dispatch.h"
#include "layers.h"

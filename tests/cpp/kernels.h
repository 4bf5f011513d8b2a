// What the tests in this folder know of the kernels.
#pragma once

#include "attention/call.h"
#include "isa/dispatch.h"
#include "layers/run.h"

#pragma once  // none: threads of the stand-in run one after the other, and what needs atomics is not run

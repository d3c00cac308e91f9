"""Triton kernels behind the operators of `pangu/ops`, a file an operator, each with its gradient;
the reference of each stands in the operator's own file.

They are imported by the variants called `triton` alone, so that nothing else needs the package.
A kernel's name begins with its operator's, by which a profile tells them apart.
Sums are in float32 and in a fixed order: no kernel adds atomically, and none waits for the host.
Checked on a CPU by Triton's interpreter; not run on a GPU.
"""

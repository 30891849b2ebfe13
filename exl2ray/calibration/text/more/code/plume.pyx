# cython: language_level=3, boundscheck=False, wraparound=False, cdivision=True
# distutils: extra_compile_args = -O3 -fopenmp
# distutils: extra_link_args = -fopenmp
"""Lagrangian particles for smell from a rendering works: where do the neighbours notice it?

The wind field is a measured time series, the turbulence a Langevin process for each particle. One particle stands for
a fixed number of odour units; the receptor grid counts seconds spent in each cell.
"""
from cython.parallel cimport parallel, prange
from libc.math cimport cos, exp, log, sin, sqrt, M_PI
from libc.stdint cimport uint64_t

import numpy as np
cimport numpy as cnp

cnp.import_array()


cdef struct Particle:
    double x, y, z
    double u, v, w
    uint64_t rng


cdef inline uint64_t xorshift(uint64_t *s) noexcept nogil:
    s[0] ^= s[0] << 13
    s[0] ^= s[0] >> 7
    s[0] ^= s[0] << 17
    return s[0]


cdef inline double uniform(uint64_t *s) noexcept nogil:
    return ((xorshift(s) >> 11) + 0.5) * (1.0 / 9007199254740992.0)


cdef inline double normal(uint64_t *s) noexcept nogil:
    # One of the two Box-Muller values is thrown away: keeping it would cost a branch and eight bytes a particle.
    return sqrt(-2.0 * log(uniform(s))) * cos(2.0 * M_PI * uniform(s))


cdef inline double sigma_w(double z, double ustar, double h) noexcept nogil:
    cdef double r = 1.0 - 0.8 * z / h
    return 1.25 * ustar * (r if r > 0.05 else 0.05)


cdef class Plume:
    cdef Particle[:] particles
    cdef readonly double h            # depth of the mixed layer, m
    cdef readonly double dt
    cdef Py_ssize_t alive

    def __init__(self, Py_ssize_t capacity, double mixing_height=600.0, double dt=1.0, uint64_t seed=1):
        cdef Py_ssize_t i
        dtype = np.dtype([("x", "f8"), ("y", "f8"), ("z", "f8"), ("u", "f8"), ("v", "f8"), ("w", "f8"), ("rng", "u8")])
        self.particles = np.zeros(capacity, dtype)
        self.h = mixing_height
        self.dt = dt
        self.alive = 0
        for i in range(capacity):
            self.particles[i].rng = (seed + <uint64_t>i * 2654435761) | 1

    def release(self, double x, double y, double z, Py_ssize_t n):
        """Sets `n` particles free at the stack; returns how many there was room for."""
        cdef Py_ssize_t end = min(self.alive + n, self.particles.shape[0]), i
        for i in range(self.alive, end):
            self.particles[i].x, self.particles[i].y, self.particles[i].z = x, y, z
            self.particles[i].u = self.particles[i].v = self.particles[i].w = 0.0
        n = end - self.alive
        self.alive = end
        return n

    def step(self, double wind_u, double wind_v, double ustar, double[:, ::1] seconds, double cell, double nose=1.5):
        """Advances all particles by dt and adds to `seconds` what passes at the height of a nose."""
        cdef Py_ssize_t i, gx, gy, nx = seconds.shape[1], ny = seconds.shape[0]
        cdef double tl, a, b, sw, shear
        cdef Particle *p
        for i in prange(self.alive, nogil=True, schedule="static", num_threads=4):
            p = &self.particles[i]
            sw = sigma_w(p.z, ustar, self.h)
            tl = 0.5 * (p.z + 2.0) / sw
            a = exp(-self.dt / tl)
            b = sqrt(1.0 - a * a)
            p.u = a * p.u + b * 2.0 * ustar * normal(&p.rng)
            p.v = a * p.v + b * 1.9 * ustar * normal(&p.rng)
            p.w = a * p.w + b * sw * normal(&p.rng)
            shear = log(1.0 + p.z / 0.3) / log(1.0 + 10.0 / 0.3)
            p.x = p.x + (wind_u * shear + p.u) * self.dt
            p.y = p.y + (wind_v * shear + p.v) * self.dt
            p.z = p.z + p.w * self.dt
            if p.z < 0.0:
                p.z = -p.z
                p.w = -p.w
            elif p.z > self.h:
                p.z = 2.0 * self.h - p.z
                p.w = -p.w
        # The counting is serial: two particles in one cell would race, and it is a tenth of the work.
        for i in range(self.alive):
            p = &self.particles[i]
            if p.z <= 2.0 * nose:
                gx, gy = <Py_ssize_t>(p.x / cell), <Py_ssize_t>(p.y / cell)
                if 0 <= gx < nx and 0 <= gy < ny:
                    seconds[gy, gx] += self.dt

    def drop_far(self, double xmax, double ymax):
        """Particles that have left the map give up their places."""
        cdef Py_ssize_t i = 0
        while i < self.alive:
            if 0 <= self.particles[i].x <= xmax and 0 <= self.particles[i].y <= ymax:
                i += 1
            else:
                self.alive -= 1
                self.particles[i], self.particles[self.alive] = self.particles[self.alive], self.particles[i]
        return self.alive

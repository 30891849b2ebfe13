// units.hpp - compile-time dimensional analysis for the boiler house simulator.
//
//     auto heat  = 3.2_kW * 20_min;               // energy, stored in joules
//     auto rise  = heat / (80_kg * water_cp);     // kelvin
//     auto wrong = heat + rise;                   // does not compile, and says which dimensions
//
// Only four base dimensions; nobody in the boiler house needs candela.

#pragma once

#include <cmath>
#include <compare>
#include <concepts>
#include <format>
#include <type_traits>

namespace boiler::units {

template <int M, int L, int T, int K>
struct dim {
    static constexpr int mass = M, length = L, time = T, temperature = K;
};

template <class A, class B>
using dim_mul = dim<A::mass + B::mass, A::length + B::length, A::time + B::time, A::temperature + B::temperature>;

template <class A, class B>
using dim_div = dim<A::mass - B::mass, A::length - B::length, A::time - B::time, A::temperature - B::temperature>;

using dimensionless = dim<0, 0, 0, 0>;

template <class D>
class quantity {
public:
    using dimension = D;

    constexpr quantity() = default;
    constexpr explicit quantity(double si) : si_(si) {}

    // A pure number may turn back into a double silently; nothing else may.
    constexpr operator double() const requires std::same_as<D, dimensionless> { return si_; }

    [[nodiscard]] constexpr double si() const { return si_; }
    [[nodiscard]] constexpr double in(quantity unit) const { return si_ / unit.si_; }

    constexpr quantity& operator+=(quantity o) { si_ += o.si_; return *this; }
    constexpr quantity& operator-=(quantity o) { si_ -= o.si_; return *this; }
    constexpr quantity& operator*=(double k) { si_ *= k; return *this; }
    constexpr quantity& operator/=(double k) { si_ /= k; return *this; }

    friend constexpr quantity operator+(quantity a, quantity b) { return a += b; }
    friend constexpr quantity operator-(quantity a, quantity b) { return a -= b; }
    friend constexpr quantity operator-(quantity a) { return quantity(-a.si_); }
    friend constexpr quantity operator*(double k, quantity a) { return a *= k; }
    friend constexpr quantity operator*(quantity a, double k) { return a *= k; }
    friend constexpr quantity operator/(quantity a, double k) { return a /= k; }
    friend constexpr auto operator<=>(quantity, quantity) = default;

private:
    double si_ = 0.0;
};

template <class A, class B>
constexpr auto operator*(quantity<A> a, quantity<B> b)
{
    return quantity<dim_mul<A, B>>(a.si() * b.si());
}

template <class A, class B>
constexpr auto operator/(quantity<A> a, quantity<B> b)
{
    return quantity<dim_div<A, B>>(a.si() / b.si());
}

template <class D>
auto sqrt(quantity<D> q)
{
    static_assert(D::mass % 2 == 0 && D::length % 2 == 0 && D::time % 2 == 0 && D::temperature % 2 == 0,
                  "square root of an odd dimension");
    return quantity<dim<D::mass / 2, D::length / 2, D::time / 2, D::temperature / 2>>(std::sqrt(q.si()));
}

using mass          = quantity<dim<1, 0, 0, 0>>;
using length        = quantity<dim<0, 1, 0, 0>>;
using duration      = quantity<dim<0, 0, 1, 0>>;
using temp_diff     = quantity<dim<0, 0, 0, 1>>;
using area          = quantity<dim<0, 2, 0, 0>>;
using volume        = quantity<dim<0, 3, 0, 0>>;
using pressure      = quantity<dim<1, -1, -2, 0>>;
using energy        = quantity<dim<1, 2, -2, 0>>;
using power         = quantity<dim<1, 2, -3, 0>>;
using mass_flow     = quantity<dim<1, 0, -1, 0>>;
using heat_capacity = quantity<dim<0, 2, -2, -1>>;   // per mass
using conductance   = quantity<dim<1, 2, -3, -1>>;   // W/K

inline constexpr heat_capacity water_cp{4186.0};
inline constexpr quantity<dim<1, -3, 0, 0>> water_density{998.2};

// Absolute temperatures are points, not vectors: adding two of them is meaningless, so this is not a
// quantity. Subtracting gives a temp_diff.
class temperature {
public:
    static constexpr temperature celsius(double c) { return temperature(c + 273.15); }
    static constexpr temperature kelvin(double k) { return temperature(k); }
    [[nodiscard]] constexpr double celsius() const { return kelvin_ - 273.15; }

    friend constexpr temp_diff operator-(temperature a, temperature b) { return temp_diff(a.kelvin_ - b.kelvin_); }
    friend constexpr temperature operator+(temperature t, temp_diff d) { return temperature(t.kelvin_ + d.si()); }
    friend constexpr temperature operator-(temperature t, temp_diff d) { return temperature(t.kelvin_ - d.si()); }
    friend constexpr auto operator<=>(temperature, temperature) = default;

private:
    constexpr explicit temperature(double k) : kelvin_(k) {}
    double kelvin_;
};

inline namespace literals {

#define BOILER_UNIT(suffix, type, factor)                                                             \
    constexpr type operator""_##suffix(long double v) { return type(static_cast<double>(v) * (factor)); } \
    constexpr type operator""_##suffix(unsigned long long v) { return type(static_cast<double>(v) * (factor)); }

BOILER_UNIT(kg, mass, 1.0)
BOILER_UNIT(t, mass, 1000.0)
BOILER_UNIT(m, length, 1.0)
BOILER_UNIT(mm, length, 1e-3)
BOILER_UNIT(s, duration, 1.0)
BOILER_UNIT(min, duration, 60.0)
BOILER_UNIT(h, duration, 3600.0)
BOILER_UNIT(K, temp_diff, 1.0)
BOILER_UNIT(W, power, 1.0)
BOILER_UNIT(kW, power, 1e3)
BOILER_UNIT(kWh, energy, 3.6e6)
BOILER_UNIT(bar, pressure, 1e5)
BOILER_UNIT(mbar, pressure, 100.0)
BOILER_UNIT(l, volume, 1e-3)

#undef BOILER_UNIT

}  // namespace literals

// Regression checks that cost nothing at run time.
static_assert((1_kW * 1_h).in(1_kWh) == 1.0);
static_assert(std::same_as<decltype(1_kW / 1_K), conductance>);
static_assert(std::same_as<decltype(1_kg / 1_s * water_cp * 1_K), power>);
static_assert(!std::is_convertible_v<double, energy>);
static_assert(temperature::celsius(70) - temperature::celsius(50) == 20_K);

}  // namespace boiler::units

// "{:.1f}" formats the SI value; there is deliberately no unit symbol, the log columns carry it.
template <class D>
struct std::formatter<boiler::units::quantity<D>> : std::formatter<double> {
    auto format(boiler::units::quantity<D> q, std::format_context& ctx) const
    {
        return std::formatter<double>::format(q.si(), ctx);
    }
};

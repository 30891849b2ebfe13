// tack.cpp - route of a dinghy through a wind field, as used by the race-night display
#include <algorithm>
#include <array>
#include <chrono>
#include <cmath>
#include <concepts>
#include <expected>
#include <format>
#include <iostream>
#include <numbers>
#include <optional>
#include <print>
#include <queue>
#include <ranges>
#include <span>
#include <string>
#include <vector>

namespace regatta {

using namespace std::chrono_literals;
using seconds = std::chrono::duration<double>;

struct Vec {
    double x{}, y{};
    friend constexpr Vec operator+(Vec a, Vec b) { return {a.x + b.x, a.y + b.y}; }
    friend constexpr Vec operator-(Vec a, Vec b) { return {a.x - b.x, a.y - b.y}; }
    friend constexpr Vec operator*(double k, Vec v) { return {k * v.x, k * v.y}; }
    [[nodiscard]] double norm() const { return std::hypot(x, y); }
    [[nodiscard]] double bearing() const { return std::atan2(x, y); }
    static Vec polar(double bearing, double r) { return {r * std::sin(bearing), r * std::cos(bearing)}; }
};

template <class F>
concept WindField = requires(const F& f, Vec where, seconds when) {
    { f.at(where, when) } -> std::convertible_to<Vec>;   // the direction the air moves to, metres per second
};

/// Boat speed over true wind angle, at the wind speeds for which somebody has measured it.
class Polar {
public:
    struct Curve {
        double wind;
        std::array<double, 7> speed;   // at 0, 30, 60, ... 180 degrees off the wind
    };

    explicit Polar(std::vector<Curve> curves) : curves_(std::move(curves)) {
        std::ranges::sort(curves_, {}, &Curve::wind);
    }

    [[nodiscard]] double speed(double wind, double angle) const {
        const auto hi = std::ranges::upper_bound(curves_, wind, {}, &Curve::wind);
        if (hi == curves_.begin()) return wind / hi->wind * along(*hi, angle);
        if (hi == curves_.end()) return along(curves_.back(), angle);   // more wind only means more spray
        const auto lo = std::prev(hi);
        return std::lerp(along(*lo, angle), along(*hi, angle), (wind - lo->wind) / (hi->wind - lo->wind));
    }

private:
    static double along(const Curve& c, double angle) {
        const double pos = std::clamp(std::abs(angle) * 6 / std::numbers::pi, 0.0, 5.9999);
        const auto i = static_cast<std::size_t>(pos);
        return std::lerp(c.speed[i], c.speed[i + 1], pos - static_cast<double>(i));
    }

    std::vector<Curve> curves_;
};

enum class Failure { becalmed, out_of_time, mark_on_land };

std::string_view describe(Failure f) {
    switch (f) {
        using enum Failure;
        case becalmed:     return "there is no wind anywhere near the boat";
        case out_of_time:  return "the mark cannot be reached before the gun";
        case mark_on_land: return "the mark is aground";
    }
    std::unreachable();
}

struct Leg {
    Vec from, to;
    seconds start, arrive;
    bool port_tack;
};

/// Isochrones on a grid: Dijkstra over cells, with both tacks as separate states, because going about costs time.
template <WindField Wind, std::predicate<Vec> Water>
class Router {
public:
    Router(const Wind& wind, Water water, const Polar& polar, double cell)
        : wind_(wind), water_(std::move(water)), polar_(polar), cell_(cell) {}

    std::expected<std::vector<Leg>, Failure> route(Vec from, Vec mark, seconds limit, seconds tack_cost = 6s) const {
        if (!water_(mark)) return std::unexpected(Failure::mark_on_land);

        const double margin = 0.6 * (mark - from).norm() + 4 * cell_;
        const Vec low{std::min(from.x, mark.x) - margin, std::min(from.y, mark.y) - margin};
        const int w = static_cast<int>((std::abs(mark.x - from.x) + 2 * margin) / cell_) + 1;
        const int h = static_cast<int>((std::abs(mark.y - from.y) + 2 * margin) / cell_) + 1;

        const auto centre = [&](int i) { return low + Vec{(i % w + 0.5) * cell_, (i / w + 0.5) * cell_}; };
        const auto cell_of = [&](Vec p) {
            return static_cast<int>((p.y - low.y) / cell_) * w + static_cast<int>((p.x - low.x) / cell_);
        };

        struct Label { seconds at; int state; auto operator<=>(const Label& o) const { return at <=> o.at; } };
        std::vector<seconds> best(static_cast<std::size_t>(2 * w * h), seconds::max());
        std::vector<int> parent(best.size(), -1);
        std::priority_queue<Label, std::vector<Label>, std::greater<>> queue;

        for (int tack : {0, 1}) {
            const int s = 2 * cell_of(from) + tack;
            best[s] = 0s;
            queue.push({0s, s});
        }

        const int goal = cell_of(mark);
        bool moved = false;
        while (!queue.empty()) {
            const auto [at, s] = queue.top();
            queue.pop();
            if (at > best[s]) continue;
            if (s / 2 == goal) return unwind(s, parent, best, centre);
            if (at > limit) return std::unexpected(Failure::out_of_time);

            const Vec here = centre(s / 2);
            const Vec air = wind_.at(here, at);
            const double force = air.norm();
            // Knight's moves as well: with eight directions only, a boat that can point 42 degrees looks
            // like one that can point 45, and every beat comes out too long.
            for (const auto [dx, dy] : moves) {
                const int cx = s / 2 % w + dx, cy = s / 2 / w + dy;
                if (cx < 0 || cy < 0 || cx >= w || cy >= h) continue;
                const int next = cy * w + cx;
                const Vec there = centre(next);
                if (!water_(there) || !water_(0.5 * (here + there))) continue;

                const Vec step = there - here;
                const double off = std::remainder(step.bearing() - (air.bearing() + std::numbers::pi),
                                                  2 * std::numbers::pi);
                const double v = polar_.speed(force, off);
                if (v < 0.05) continue;
                moved = true;

                const int tack = off < 0;
                seconds t = at + seconds{step.norm() / v};
                if (tack != s % 2) t += tack_cost;
                const int n = 2 * next + tack;
                if (t < best[n]) {
                    best[n] = t;
                    parent[n] = s;
                    queue.push({t, n});
                }
            }
        }
        return std::unexpected(moved ? Failure::out_of_time : Failure::becalmed);
    }

private:
    static constexpr auto moves = std::to_array<std::pair<int, int>>({
        {1, 0}, {0, 1}, {-1, 0}, {0, -1}, {1, 1}, {-1, 1}, {1, -1}, {-1, -1},
        {2, 1}, {1, 2}, {-2, 1}, {-1, 2}, {2, -1}, {1, -2}, {-2, -1}, {-1, -2}});

    template <class Centre>
    static std::vector<Leg> unwind(int s, const std::vector<int>& parent, const std::vector<seconds>& best,
                                   const Centre& centre) {
        std::vector<Leg> legs;
        for (; parent[s] >= 0; s = parent[s]) {
            const int p = parent[s];
            legs.push_back({centre(p / 2), centre(s / 2), best[p], best[s], s % 2 == 1});
        }
        std::ranges::reverse(legs);
        return legs;
    }

    const Wind& wind_;
    Water water_;
    const Polar& polar_;
    double cell_;
};

/// A steady breeze that veers to and fro, with a lighter band under the cliff.
struct BayWind {
    Vec at(Vec p, seconds t) const {
        const double swing = 0.17 * std::sin(t.count() * 2 * std::numbers::pi / 480);
        const double force = 5.5 - 3.0 * std::exp(-std::max(0.0, p.x + 400) / 120);
        return Vec::polar(std::numbers::pi + swing, force);
    }
};

}  // namespace regatta

int main() {
    using namespace regatta;
    const Polar dinghy{{{3.0, {0, 0.6, 1.5, 1.8, 1.7, 1.4, 1.2}}, {6.0, {0, 1.0, 2.4, 2.9, 3.0, 2.7, 2.4}}}};
    const BayWind wind;
    const auto deep = [](Vec p) { return p.x > -450 && (p - Vec{40, 500}).norm() > 60; };   // cliff and sandbank

    const auto legs = Router{wind, deep, dinghy, 20.0}.route({0, 0}, {60, 1000}, 30min);
    if (!legs) {
        std::println(std::cerr, "no route: {}", describe(legs.error()));
        return 1;
    }
    for (const auto& run : *legs | std::views::chunk_by([](auto& a, auto& b) { return a.port_tack == b.port_tack; })) {
        const Leg& a = *run.begin();
        const Leg& z = *std::ranges::prev(run.end());
        std::println("{:>5.0f} s  {:9}  to ({:4.0f}, {:4.0f})", a.start.count(), a.port_tack ? "port" : "starboard",
                     z.to.x, z.to.y);
    }
}

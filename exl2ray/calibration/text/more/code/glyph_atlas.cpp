// Packs glyph bitmaps into texture pages with the skyline method and evicts whole pages, never
// single glyphs: holes in a skyline are useless anyway, and text comes in runs of the same script.

#include "glyph_atlas.h"

#include <algorithm>
#include <bit>
#include <cassert>
#include <cstring>
#include <limits>
#include <optional>
#include <utility>

namespace inkwell {

namespace {

constexpr int kPadding = 1;          // linear filtering must not see the neighbour
constexpr std::size_t kMaxPages = 4;

}  // namespace

// The upper edge of everything placed so far, left to right, as maximal horizontal runs.
class Skyline {
public:
    Skyline(int width, int height) : width_(width), height_(height), runs_{{0, 0, width}} {}

    std::optional<Point> place(int w, int h)
    {
        int best_top = std::numeric_limits<int>::max();
        int best_waste = best_top;
        std::size_t best = runs_.size();

        for (std::size_t i = 0; i < runs_.size(); ++i) {
            if (runs_[i].x + w > width_)
                break;
            const auto [y, waste] = fit(i, w);
            if (y + h > height_)
                continue;
            if (y + h < best_top || (y + h == best_top && waste < best_waste)) {
                best_top = y + h;
                best_waste = waste;
                best = i;
            }
        }
        if (best == runs_.size())
            return std::nullopt;

        const Point at{runs_[best].x, best_top - h};
        raise(best, w, best_top);
        return at;
    }

    double fill_ratio() const
    {
        long under = 0;
        for (const Run& r : runs_)
            under += long{r.w} * r.y;
        return static_cast<double>(under) / (double(width_) * height_);
    }

private:
    struct Run { int x, y, w; };

    // Height a box of width w would rest at on run i, and the area lost below it.
    std::pair<int, int> fit(std::size_t i, int w) const
    {
        int y = 0;
        int left = w;
        for (std::size_t k = i; left > 0; ++k) {
            y = std::max(y, runs_[k].y);
            left -= runs_[k].w;
        }
        int waste = 0;
        left = w;
        for (std::size_t k = i; left > 0; ++k) {
            waste += (y - runs_[k].y) * std::min(left, runs_[k].w);
            left -= runs_[k].w;
        }
        return {y, waste};
    }

    void raise(std::size_t i, int w, int top)
    {
        const int x = runs_[i].x;
        auto it = runs_.insert(runs_.begin() + static_cast<std::ptrdiff_t>(i), Run{x, top, w});
        const auto end_x = x + w;
        for (auto next = it + 1; next != runs_.end() && next->x < end_x;) {
            const int overlap = std::min(next->w, end_x - next->x);
            next->x += overlap;
            next->w -= overlap;
            next = next->w == 0 ? runs_.erase(next) : next + 1;
        }
        // Join equal heights so the list stays short; a full page of Latin has about 30 runs.
        for (std::size_t k = 1; k < runs_.size();) {
            if (runs_[k].y == runs_[k - 1].y) {
                runs_[k - 1].w += runs_[k].w;
                runs_.erase(runs_.begin() + static_cast<std::ptrdiff_t>(k));
            } else {
                ++k;
            }
        }
    }

    int width_, height_;
    std::vector<Run> runs_;
};

struct GlyphAtlas::Page {
    explicit Page(int size) : skyline(size, size), pixels(std::size_t(size) * size) {}

    Skyline skyline;
    std::vector<std::uint8_t> pixels;
    std::vector<GlyphKey> residents;
    std::uint64_t last_used = 0;
    Rect dirty{};
    std::uint32_t generation = 0;
};

GlyphAtlas::GlyphAtlas(int page_size, Rasterizer& rasterizer)
    : page_size_(page_size), rasterizer_(rasterizer)
{
    assert(std::has_single_bit(static_cast<unsigned>(page_size)));
}

GlyphAtlas::~GlyphAtlas() = default;

// Valid until the next begin_frame(): a page used in this frame is never evicted during it.
GlyphSlot GlyphAtlas::lookup(const GlyphKey& key)
{
    if (auto it = slots_.find(key); it != slots_.end()) {
        pages_[it->second.page]->last_used = frame_;
        return it->second;
    }

    Bitmap bm = rasterizer_.render(key);
    if (bm.width == 0 || bm.height == 0) {
        // Spaces and friends: remember them, or every blank costs a trip to the rasterizer.
        return slots_.emplace(key, GlyphSlot{.page = GlyphSlot::kNothing}).first->second;
    }
    const int w = bm.width + 2 * kPadding;
    const int h = bm.height + 2 * kPadding;
    if (w > page_size_ || h > page_size_)
        return {.page = GlyphSlot::kTooLarge};      // caller falls back to drawing the outline

    std::optional<Point> at;
    std::size_t p = pages_.size();
    while (p-- > 0 && !(at = pages_[p]->skyline.place(w, h))) {
    }
    if (!at) {
        p = fresh_page();
        if (p == kNoPage)
            return {.page = GlyphSlot::kTooLarge};
        at = pages_[p]->skyline.place(w, h);
    }

    Page& page = *pages_[p];
    const Point inner{at->x + kPadding, at->y + kPadding};
    for (int row = 0; row < bm.height; ++row)
        std::memcpy(&page.pixels[std::size_t(inner.y + row) * page_size_ + inner.x],
                    bm.data.get() + std::ptrdiff_t(row) * bm.stride, std::size_t(bm.width));
    page.dirty = page.dirty.united({inner.x, inner.y, bm.width, bm.height});
    page.residents.push_back(key);
    page.last_used = frame_;

    const GlyphSlot slot{.page = static_cast<std::uint16_t>(p),
                         .x = static_cast<std::uint16_t>(inner.x),
                         .y = static_cast<std::uint16_t>(inner.y),
                         .w = static_cast<std::uint16_t>(bm.width),
                         .h = static_cast<std::uint16_t>(bm.height),
                         .bearing = bm.bearing};
    slots_.emplace(key, slot);
    return slot;
}

std::size_t GlyphAtlas::fresh_page()
{
    if (pages_.size() < kMaxPages) {
        pages_.push_back(std::make_unique<Page>(page_size_));
        return pages_.size() - 1;
    }
    const auto oldest = std::ranges::min_element(pages_, {}, [](const auto& p) { return p->last_used; });
    if ((*oldest)->last_used == frame_)
        return kNoPage;                             // all four pages on screen at once: a CJK novel

    for (const GlyphKey& k : (*oldest)->residents)
        slots_.erase(k);
    const std::uint32_t generation = (*oldest)->generation + 1;
    *oldest = std::make_unique<Page>(page_size_);
    (*oldest)->generation = generation;
    (*oldest)->dirty = {0, 0, page_size_, page_size_};
    ++evictions_;
    return static_cast<std::size_t>(oldest - pages_.begin());
}

void GlyphAtlas::upload(TextureSink& sink)
{
    for (std::size_t i = 0; i < pages_.size(); ++i) {
        Page& p = *pages_[i];
        if (p.dirty.empty())
            continue;
        sink.update(i, p.dirty, p.pixels.data(), page_size_);
        p.dirty = {};
    }
}

}  // namespace inkwell

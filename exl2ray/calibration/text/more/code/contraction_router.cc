// Queries on a contraction hierarchy.
//
// Every node has a rank. Upward edges lead to nodes of higher rank and are
// stored with the tail for the forward search, with the head for the backward
// search. A shortest path always has the form "up, then down", so both
// searches only ever climb, and they meet at the highest node of the path.

#include "routing/ch_query.h"

#include <algorithm>
#include <cstdint>
#include <limits>
#include <optional>
#include <utility>
#include <vector>

#include "absl/log/check.h"
#include "absl/types/span.h"
#include "routing/ch_graph.h"
#include "routing/indexed_heap.h"

namespace routing {
namespace {

constexpr Weight kUnreached = std::numeric_limits<Weight>::max();

}  // namespace

// Labels are kept between queries and invalidated by a version number:
// clearing eighteen million of them would take longer than the search.
class ChQuery::Side {
 public:
  explicit Side(size_t num_nodes) : labels_(num_nodes), heap_(num_nodes) {}

  void Reset() {
    heap_.Clear();
    if (++version_ == 0) {
      std::fill(labels_.begin(), labels_.end(), Label{});
      version_ = 1;
    }
  }

  Weight Distance(NodeId v) const {
    return labels_[v].version == version_ ? labels_[v].dist : kUnreached;
  }

  void Relax(NodeId v, Weight dist, EdgeId via) {
    Label& label = labels_[v];
    if (label.version != version_) {
      label = {.dist = dist, .via = via, .version = version_};
      heap_.Push(v, dist);
    } else if (dist < label.dist) {
      label.dist = dist;
      label.via = via;
      heap_.DecreaseKey(v, dist);
    }
  }

  EdgeId Via(NodeId v) const { return labels_[v].via; }
  bool Empty() const { return heap_.Empty(); }
  Weight MinKey() const { return heap_.MinKey(); }
  NodeId PopMin() { return heap_.PopMin(); }

 private:
  struct Label {
    Weight dist = kUnreached;
    EdgeId via = kNoEdge;
    uint32_t version = 0;
  };

  std::vector<Label> labels_;
  IndexedHeap<Weight> heap_;
  uint32_t version_ = 0;
};

ChQuery::ChQuery(const ChGraph* graph)
    : graph_(graph),
      forward_(std::make_unique<Side>(graph->num_nodes())),
      backward_(std::make_unique<Side>(graph->num_nodes())) {}

ChQuery::~ChQuery() = default;

std::optional<Weight> ChQuery::Run(NodeId source, NodeId target) {
  CHECK_LT(source, graph_->num_nodes());
  CHECK_LT(target, graph_->num_nodes());

  forward_->Reset();
  backward_->Reset();
  forward_->Relax(source, 0, kNoEdge);
  backward_->Relax(target, 0, kNoEdge);

  best_ = kUnreached;
  meeting_ = kNoNode;
  settled_ = 0;

  // Unlike in plain bidirectional search we can't stop when the searches
  // first meet: a later meeting further up may be shorter. A side is finished
  // when its smallest key is no better than the best path known.
  while (true) {
    const bool f = !forward_->Empty() && forward_->MinKey() < best_;
    const bool b = !backward_->Empty() && backward_->MinKey() < best_;
    if (!f && !b) break;
    if (f && (!b || forward_->MinKey() <= backward_->MinKey())) {
      Step(*forward_, *backward_, Direction::kForward);
    } else {
      Step(*backward_, *forward_, Direction::kBackward);
    }
  }

  if (meeting_ == kNoNode) return std::nullopt;
  return best_;
}

void ChQuery::Step(Side& self, const Side& other, Direction direction) {
  const NodeId u = self.PopMin();
  const Weight du = self.Distance(u);
  ++settled_;

  if (const Weight there = other.Distance(u); there != kUnreached && du + there < best_) {
    best_ = du + there;
    meeting_ = u;
  }

  // Stall on demand: if a higher neighbour reaches u more cheaply, nothing
  // that goes up from u can be part of a shortest path.
  for (const ChEdge& e : graph_->UpEdges(u, Reverse(direction))) {
    const Weight dv = self.Distance(e.head);
    if (dv != kUnreached && dv + e.weight < du) return;
  }

  for (const ChEdge& e : graph_->UpEdges(u, direction)) {
    self.Relax(e.head, du + e.weight, e.id);
  }
}

std::vector<EdgeId> ChQuery::UnpackedPath() const {
  std::vector<EdgeId> path;
  if (meeting_ == kNoNode) return path;

  std::vector<EdgeId> up;
  for (NodeId v = meeting_; forward_->Via(v) != kNoEdge;) {
    const EdgeId e = forward_->Via(v);
    up.push_back(e);
    v = graph_->Tail(e);
  }
  std::reverse(up.begin(), up.end());
  for (EdgeId e : up) Unpack(e, &path);

  for (NodeId v = meeting_; backward_->Via(v) != kNoEdge;) {
    const EdgeId e = backward_->Via(v);
    Unpack(e, &path);
    v = graph_->Head(e);
  }
  return path;
}

// A shortcut stands for two edges, either of which may be a shortcut again.
// An explicit stack, because a motorway across the country nests deeply.
void ChQuery::Unpack(EdgeId edge, std::vector<EdgeId>* path) const {
  std::vector<EdgeId> stack = {edge};
  while (!stack.empty()) {
    const EdgeId e = stack.back();
    stack.pop_back();
    if (const auto parts = graph_->ShortcutParts(e)) {
      stack.push_back(parts->second);
      stack.push_back(parts->first);
    } else {
      path->push_back(e);
    }
  }
}

}  // namespace routing

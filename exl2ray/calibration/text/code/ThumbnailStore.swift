import Foundation

/// Produces and caches thumbnails for a photo grid.
///
/// Scrolling asks for the same picture many times before the first answer is ready. An actor makes
/// the bookkeeping safe, but actors are re-entrant: while one call awaits the decoder another may
/// enter. Storing the running task, not just its result, keeps the decoder from doing work twice.
public actor ThumbnailStore<Image: Sendable> {
    public struct Key: Hashable, Sendable {
        public let asset: String
        public let width: Int

        public init(asset: String, width: Int) {
            self.asset = asset
            // Round up to a multiple of 64 so that rotating the phone does not miss the cache
            // for a difference of three pixels.
            self.width = (max(width, 1) + 63) / 64 * 64
        }
    }

    public typealias Decoder = @Sendable (Key) async throws -> (image: Image, bytes: Int)

    private enum Entry {
        case running(Task<(image: Image, bytes: Int), Error>, waiters: Int)
        case ready(Image, bytes: Int, lastUse: UInt64)
    }

    public private(set) var bytesInUse = 0
    private let capacity: Int
    private let decode: Decoder
    private var entries: [Key: Entry] = [:]
    private var clock: UInt64 = 0

    public init(capacity: Int, decode: @escaping Decoder) {
        precondition(capacity > 0, "a cache of \(capacity) bytes cannot hold anything")
        self.capacity = capacity
        self.decode = decode
    }

    /// Returns the thumbnail, decoding it if necessary.
    ///
    /// - Throws: whatever the decoder throws. Failures are not cached: a picture that is still
    ///   being downloaded fails now and succeeds a second later.
    public func thumbnail(for key: Key) async throws -> Image {
        switch entries[key] {
        case .ready(let image, let bytes, _)?:
            entries[key] = .ready(image, bytes: bytes, lastUse: tick())
            return image
        case .running(let task, let waiters)?:
            entries[key] = .running(task, waiters: waiters + 1)
            return try await finish(task, for: key)
        case nil:
            let task = Task(priority: .userInitiated) { [decode] in try await decode(key) }
            entries[key] = .running(task, waiters: 1)
            return try await finish(task, for: key)
        }
    }

    /// Called when a cell leaves the screen. The decoder stops only when nobody else is waiting.
    public func release(_ key: Key) {
        guard case .running(let task, let waiters)? = entries[key] else { return }
        if waiters > 1 {
            entries[key] = .running(task, waiters: waiters - 1)
        } else {
            task.cancel()
            entries[key] = nil
        }
    }

    /// Reaction to a memory warning: drops the least recently used thumbnails until at most the
    /// given share of the capacity is used.
    public func trim(toFraction fraction: Double) {
        evict(downTo: Int(Double(capacity) * min(max(fraction, 0), 1)))
    }

    private func finish(_ task: Task<(image: Image, bytes: Int), Error>, for key: Key) async throws -> Image {
        do {
            let (image, bytes) = try await task.value
            // Several callers resume here; only the first one finds the entry still running, and
            // none does if it was released in the meantime.
            if case .running(let current, _)? = entries[key], current == task {
                insert(image, bytes: bytes, for: key)
            }
            return image
        } catch {
            if case .running(let current, _)? = entries[key], current == task {
                entries[key] = nil
            }
            throw error
        }
    }

    private func insert(_ image: Image, bytes: Int, for key: Key) {
        guard bytes <= capacity else {
            entries[key] = nil  // would evict everything else and still not fit
            return
        }
        entries[key] = .ready(image, bytes: bytes, lastUse: tick())
        bytesInUse += bytes
        evict(downTo: capacity)
    }

    private func evict(downTo limit: Int) {
        guard bytesInUse > limit else { return }
        let byAge = entries.compactMap { key, entry -> (key: Key, bytes: Int, lastUse: UInt64)? in
            guard case .ready(_, let bytes, let lastUse) = entry else { return nil }
            return (key, bytes, lastUse)
        }.sorted { $0.lastUse < $1.lastUse }

        for victim in byAge where bytesInUse > limit {
            entries[victim.key] = nil
            bytesInUse -= victim.bytes
        }
    }

    private func tick() -> UInt64 {
        clock += 1
        return clock
    }
}

import Foundation

/// A quadrat survey recorded under water, on a tablet in a housing with three big buttons.
///
/// Dives are precious and fingers are cold, so the recorder never asks for confirmation and never loses a
/// tap: everything is an event in an append-only log, and the state is whatever the log says.
actor DiveLog {
    enum Event: Codable, Equatable {
        case descended(at: Date, site: Site.ID)
        case quadratPlaced(at: Date, depth: Measurement<UnitLength>)
        case counted(Species, Int)
        case undone
        case surfaced(at: Date)
    }

    enum Failure: Error, CustomStringConvertible {
        case notDiving
        case noQuadrat
        case corrupt(line: Int, underlying: any Error)

        var description: String {
            switch self {
            case .notDiving: "There is no dive in progress."
            case .noQuadrat: "Place a quadrat before counting."
            case .corrupt(let line, let error): "The log is damaged in line \(line): \(error)"
            }
        }
    }

    private let handle: FileHandle
    private let encoder = JSONEncoder()
    private var events: [Event] = []
    private var observers: [UUID: AsyncStream<Tally>.Continuation] = [:]

    init(url: URL) throws {
        if !FileManager.default.fileExists(atPath: url.path) {
            FileManager.default.createFile(atPath: url.path, contents: nil)
        }
        handle = try FileHandle(forUpdating: url)
        let decoder = JSONDecoder()
        decoder.dateDecodingStrategy = .millisecondsSince1970
        encoder.dateEncodingStrategy = .millisecondsSince1970

        let lines = try handle.readToEnd()?.split(separator: UInt8(ascii: "\n")) ?? []
        for (number, line) in lines.enumerated() {
            do {
                events.append(try decoder.decode(Event.self, from: Data(line)))
            } catch where number == lines.count - 1 {
                // The battery died halfway through the last line. Cut it off and go on.
                let keep = lines.dropLast().reduce(0) { $0 + $1.count + 1 }
                try handle.truncate(atOffset: UInt64(keep))
            } catch {
                throw Failure.corrupt(line: number + 1, underlying: error)
            }
        }
        try handle.seekToEnd()
    }

    var tally: Tally { Tally(replaying: events) }

    func descend(at site: Site.ID, now: Date = .now) throws {
        try append(.descended(at: now, site: site))
    }

    func placeQuadrat(depth metres: Double, now: Date = .now) throws {
        guard tally.isDiving else { throw Failure.notDiving }
        try append(.quadratPlaced(at: now, depth: Measurement(value: metres, unit: .meters)))
    }

    func count(_ species: Species, _ n: Int = 1) throws {
        guard tally.current != nil else { throw Failure.noQuadrat }
        try append(.counted(species, n))
    }

    func undo() throws { try append(.undone) }

    func surface(now: Date = .now) throws { try append(.surfaced(at: now)) }

    func changes() -> AsyncStream<Tally> {
        let (stream, continuation) = AsyncStream.makeStream(of: Tally.self, bufferingPolicy: .bufferingNewest(1))
        let id = UUID()
        observers[id] = continuation
        continuation.onTermination = { [weak self] _ in
            Task { await self?.forget(id) }
        }
        continuation.yield(tally)
        return stream
    }

    private func forget(_ id: UUID) { observers[id] = nil }

    private func append(_ event: Event) throws {
        var line = try encoder.encode(event)
        line.append(UInt8(ascii: "\n"))
        try handle.write(contentsOf: line)
        try handle.synchronize()
        events.append(event)
        let now = tally
        for observer in observers.values { observer.yield(now) }
    }
}

struct Species: Hashable, Codable, RawRepresentable, ExpressibleByStringLiteral {
    let rawValue: String
    init(rawValue: String) { self.rawValue = rawValue }
    init(stringLiteral value: String) { rawValue = value }

    static let giantKelp: Self = "Macrocystis pyrifera"
    static let purpleUrchin: Self = "Strongylocentrotus purpuratus"
    static let batStar: Self = "Patiria miniata"
}

struct Site: Identifiable, Codable {
    let id: String
    var name: String
    var bearingFromBuoy: Int
}

/// What the events add up to.
struct Tally: Equatable, Sendable {
    struct Quadrat: Equatable, Sendable {
        var depth: Measurement<UnitLength>
        var counts: [Species: Int] = [:]
        static let area = 0.25   // square metres
        func density(of s: Species) -> Double { Double(counts[s, default: 0]) / Self.area }
    }

    private(set) var isDiving = false
    private(set) var quadrats: [Quadrat] = []
    var current: Quadrat? { isDiving ? quadrats.last : nil }

    init(replaying events: [DiveLog.Event]) {
        // An undo strikes out the latest event that is still standing. Two undos strike out two.
        var standing: [DiveLog.Event] = []
        for event in events {
            if event == .undone { _ = standing.popLast() } else { standing.append(event) }
        }
        for event in standing {
            switch event {
            case .descended:
                isDiving = true
                quadrats = []
            case .quadratPlaced(_, let depth):
                quadrats.append(Quadrat(depth: depth))
            case .counted(let species, let n):
                quadrats[quadrats.endIndex - 1].counts[species, default: 0] += n
            case .surfaced:
                isDiving = false
            case .undone:
                break
            }
        }
    }

    /// Urchins per kelp plant over the whole dive, or nil on bare rock, where the ratio says nothing.
    var grazingPressure: Double? {
        let kelp = quadrats.reduce(0) { $0 + $1.counts[.giantKelp, default: 0] }
        let urchins = quadrats.reduce(0) { $0 + $1.counts[.purpleUrchin, default: 0] }
        return kelp > 0 ? Double(urchins) / Double(kelp) : nil
    }

    var summary: AttributedString {
        var text = AttributedString("\(quadrats.count) quadrats")
        if let pressure = grazingPressure {
            var note = AttributedString(String(format: ", %.1f urchins per plant", pressure))
            if pressure > 10 { note.inlinePresentationIntent = .stronglyEmphasized }
            text += note
        }
        return text
    }
}

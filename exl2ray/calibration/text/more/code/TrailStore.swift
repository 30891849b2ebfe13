import CoreLocation
import Foundation
import Observation

/// A hike as recorded by the phone, cleaned up enough to be worth keeping.
struct Hike: Identifiable, Codable, Hashable {
    struct Point: Codable, Hashable {
        var latitude, longitude, altitude: Double
        var time: Date
        var accuracy: Double
    }

    let id: UUID
    var name: String
    var points: [Point]

    var duration: Duration {
        guard let first = points.first, let last = points.last else { return .zero }
        return .seconds(last.time.timeIntervalSince(first.time))
    }

    var metres: Double {
        zip(points, points.dropFirst()).reduce(0) { $0 + $1.0.distance(to: $1.1) }
    }

    /// Climb with a dead band: a barometer that breathes by two metres adds up to an Alp otherwise.
    func climb(deadBand: Double = 4) -> Double {
        guard var anchor = points.first?.altitude else { return 0 }
        var total = 0.0
        for point in points.dropFirst() {
            let rise = point.altitude - anchor
            if rise > deadBand {
                total += rise
                anchor = point.altitude
            } else if rise < -deadBand {
                anchor = point.altitude
            }
        }
        return total
    }
}

extension Hike.Point {
    func distance(to other: Self) -> Double {
        let r = 6_371_008.8
        let φ1 = latitude * .pi / 180, φ2 = other.latitude * .pi / 180
        let dφ = φ2 - φ1, dλ = (other.longitude - longitude) * .pi / 180
        let a = sin(dφ / 2) * sin(dφ / 2) + cos(φ1) * cos(φ2) * sin(dλ / 2) * sin(dλ / 2)
        return 2 * r * asin(min(1, a.squareRoot()))
    }
}

enum RecordingError: LocalizedError {
    case denied
    case alreadyRecording(since: Date)
    case diskFull(needed: Measurement<UnitInformationStorage>)

    var errorDescription: String? {
        switch self {
        case .denied:
            String(localized: "The trail cannot be recorded without access to your location.")
        case .alreadyRecording(let since):
            String(localized: "A hike has been running since \(since, format: .dateTime.hour().minute()).")
        case .diskFull(let needed):
            String(localized: "Please free \(needed.formatted()) first.")
        }
    }
}

@MainActor
@Observable
final class TrailStore {
    private(set) var hikes: [Hike] = []
    private(set) var current: Hike?
    var lastError: (any Error)?

    @ObservationIgnored private var recorder: Task<Void, Never>?
    private let files: HikeFiles

    init(files: HikeFiles) {
        self.files = files
    }

    func load() async {
        do {
            hikes = try await files.all().sorted { $0.points.first?.time ?? .distantPast > $1.points.first?.time ?? .distantPast }
        } catch {
            lastError = error
        }
    }

    func start(named name: String) throws {
        if let begun = current?.points.first?.time {
            throw RecordingError.alreadyRecording(since: begun)
        }
        current = Hike(id: UUID(), name: name, points: [])
        recorder = Task { [weak self] in
            do {
                for try await update in CLLocationUpdate.liveUpdates(.fitness) {
                    guard let self, !Task.isCancelled else { return }
                    if let location = update.location {
                        self.take(location)
                    }
                }
            } catch {
                self?.lastError = error
            }
        }
    }

    private func take(_ location: CLLocation) {
        // Under trees accuracy goes from 5 to 60 metres within one step, and the track with it.
        guard location.horizontalAccuracy > 0, location.horizontalAccuracy < 30 else { return }
        let point = Hike.Point(
            latitude: location.coordinate.latitude,
            longitude: location.coordinate.longitude,
            altitude: location.altitude,
            time: location.timestamp,
            accuracy: location.horizontalAccuracy
        )
        if let last = current?.points.last {
            let gap = point.time.timeIntervalSince(last.time)
            let step = last.distance(to: point)
            guard gap > 0, step / gap < 12 else { return }
            guard step > max(3, point.accuracy / 2) else { return }
        }
        current?.points.append(point)
        if let hike = current, hike.points.count.isMultiple(of: 50) {
            Task { try? await files.write(hike, draft: true) }
        }
    }

    @discardableResult
    func finish() async throws -> Hike? {
        recorder?.cancel()
        recorder = nil
        defer { current = nil }
        guard let hike = current, hike.points.count > 1 else { return nil }
        try await files.write(hike, draft: false)
        hikes.insert(hike, at: 0)
        return hike
    }

    func delete(_ offsets: IndexSet) {
        let doomed = offsets.map { hikes[$0].id }
        hikes.remove(atOffsets: offsets)
        Task {
            for id in doomed {
                do { try await files.remove(id) } catch { lastError = error }
            }
        }
    }
}

actor HikeFiles {
    private let folder: URL

    init(folder: URL = .documentsDirectory.appending(path: "hikes")) throws {
        self.folder = folder
        try FileManager.default.createDirectory(at: folder, withIntermediateDirectories: true)
    }

    func all() throws -> [Hike] {
        try FileManager.default
            .contentsOfDirectory(at: folder, includingPropertiesForKeys: nil)
            .filter { $0.pathExtension == "hike" }
            .compactMap { try? JSONDecoder().decode(Hike.self, from: Data(contentsOf: $0)) }
    }

    func write(_ hike: Hike, draft: Bool) throws {
        let data = try JSONEncoder().encode(hike)
        let target = folder.appending(path: "\(hike.id).\(draft ? "draft" : "hike")")
        let free = try folder.resourceValues(forKeys: [.volumeAvailableCapacityForImportantUsageKey])
            .volumeAvailableCapacityForImportantUsage ?? .max
        guard free > Int64(data.count) * 2 else {
            throw RecordingError.diskFull(needed: .init(value: Double(data.count * 2), unit: .bytes))
        }
        try data.write(to: target, options: .atomic)
        if !draft {
            try? FileManager.default.removeItem(at: folder.appending(path: "\(hike.id).draft"))
        }
    }

    func remove(_ id: UUID) throws {
        try FileManager.default.removeItem(at: folder.appending(path: "\(id).hike"))
    }
}

//! Turns a recording of a home computer cassette into bytes.
//!
//! The format is the simple kind: a zero is one long wave, a one is two short waves, each byte has a
//! start bit (0), eight data bits with the lowest first, and two stop bits (1). A block starts with
//! at least two seconds of short waves, so the decoder can measure the actual tape speed: a machine
//! with a tired belt runs up to 12 % slow.

const std = @import("std");
const Allocator = std.mem.Allocator;

pub const Error = error{
    NoLeader,
    LostSync,
    BadStopBit,
    ChecksumMismatch,
} || Allocator.Error;

pub const Block = struct {
    number: u8,
    data: []u8,
    speed_error_percent: f32,

    pub fn deinit(self: *Block, gpa: Allocator) void {
        gpa.free(self.data);
        self.* = undefined;
    }
};

/// Distances between rising zero crossings, in samples, with sub-sample precision.
pub const Waves = struct {
    samples: []const i16,
    pos: usize = 1,
    last_crossing: ?f32 = null,
    /// Tape hiss crosses zero too; only crossings after a swing below -threshold count.
    threshold: i16,
    armed: bool = false,

    pub fn init(samples: []const i16) Waves {
        var peak: i16 = 1;
        for (samples) |s| peak = @max(peak, if (s == std.math.minInt(i16)) std.math.maxInt(i16) else @as(i16, @intCast(@abs(s))));
        return .{ .samples = samples, .threshold = @divTrunc(peak, 8) };
    }

    pub fn next(self: *Waves) ?f32 {
        while (self.pos < self.samples.len) : (self.pos += 1) {
            const a = self.samples[self.pos - 1];
            const b = self.samples[self.pos];
            if (b < -self.threshold) self.armed = true;
            if (!self.armed or a >= 0 or b < 0) continue;

            self.armed = false;
            const af: f32 = @floatFromInt(a);
            const bf: f32 = @floatFromInt(b);
            const at = @as(f32, @floatFromInt(self.pos - 1)) + af / (af - bf);
            defer self.last_crossing = at;
            if (self.last_crossing) |before| {
                self.pos += 1;
                return at - before;
            }
        }
        return null;
    }
};

const Bits = struct {
    waves: *Waves,
    short: f32,

    fn isShort(self: *const Bits, len: f32) bool {
        return len < self.short * 1.5;
    }

    /// Follows slow drift; a single dropout must not pull the reference along.
    fn track(self: *Bits, len: f32) void {
        const as_short = if (self.isShort(len)) len else len / 2;
        if (@abs(as_short - self.short) < self.short * 0.2)
            self.short += (as_short - self.short) / 32;
    }

    fn bit(self: *Bits) Error!u1 {
        const first = self.waves.next() orelse return error.LostSync;
        self.track(first);
        if (!self.isShort(first)) return 0;
        const second = self.waves.next() orelse return error.LostSync;
        self.track(second);
        // Half a one followed by a zero: we are between bits.
        return if (self.isShort(second)) 1 else error.LostSync;
    }

    fn byte(self: *Bits) Error!u8 {
        if (try self.bit() != 0) return error.LostSync;
        return self.afterStart();
    }

    fn afterStart(self: *Bits) Error!u8 {
        var value: u8 = 0;
        for (0..8) |i| value |= @as(u8, try self.bit()) << @intCast(i);
        if (try self.bit() != 1 or try self.bit() != 1) return error.BadStopBit;
        return value;
    }
};

pub const Options = struct {
    sample_rate: u32 = 44_100,
    short_hz: f32 = 2400,
    min_leader_waves: u32 = 1200,
    max_speed_error: f32 = 0.15,
};

/// Finds the next leader and decodes the block behind it. Caller owns `Block.data`.
pub fn nextBlock(gpa: Allocator, waves: *Waves, opt: Options) Error!Block {
    const nominal = @as(f32, @floatFromInt(opt.sample_rate)) / opt.short_hz;
    var run: u32 = 0;
    var sum: f64 = 0;

    const short: f32 = while (waves.next()) |len| {
        const off = @abs(len / nominal - 1);
        if (off < opt.max_speed_error) {
            run += 1;
            sum += len;
        } else if (run >= opt.min_leader_waves) {
            // This long wave is the start bit of the first byte, already consumed.
            break @floatCast(sum / @as(f64, @floatFromInt(run)));
        } else {
            run = 0;
            sum = 0;
        }
    } else return error.NoLeader;

    var bits: Bits = .{ .waves = waves, .short = short };
    const number = try bits.afterStart();
    const lo = try bits.byte();
    const hi = try bits.byte();
    const len = @as(usize, hi) << 8 | lo;

    const data = try gpa.alloc(u8, len);
    errdefer gpa.free(data);
    var sum8: u8 = number +% lo +% hi;
    for (data) |*d| {
        d.* = try bits.byte();
        sum8 +%= d.*;
    }
    if (try bits.byte() != sum8) return error.ChecksumMismatch;

    return .{
        .number = number,
        .data = data,
        .speed_error_percent = (short / nominal - 1) * 100,
    };
}

fn appendWave(list: *std.ArrayList(i16), gpa: Allocator, period: f32, phase: *f32) !void {
    const n: usize = @intFromFloat(period + phase.*);
    phase.* = period + phase.* - @as(f32, @floatFromInt(n));
    for (0..n) |i| {
        const t = @as(f32, @floatFromInt(i)) / period;
        // starts low, so that the rising crossing lies in the middle of the wave
        try list.append(gpa, @intFromFloat(-9000 * @sin(2 * std.math.pi * t)));
    }
}

test "a slow tape decodes and reports its speed" {
    const gpa = std.testing.allocator;
    var pcm: std.ArrayList(i16) = .empty;
    defer pcm.deinit(gpa);
    var phase: f32 = 0;
    const short = 44_100.0 / 2400.0 * 1.08;

    for (0..3000) |_| try appendWave(&pcm, gpa, short, &phase);
    const payload = [_]u8{ 3, 2, 0, 'h', 'i', 3 +% 2 +% 'h' +% 'i' };
    for (payload) |b| {
        try appendWave(&pcm, gpa, short * 2, &phase);
        for (0..8) |i| {
            if (b >> @intCast(i) & 1 == 1) {
                for (0..2) |_| try appendWave(&pcm, gpa, short, &phase);
            } else try appendWave(&pcm, gpa, short * 2, &phase);
        }
        for (0..4) |_| try appendWave(&pcm, gpa, short, &phase);
    }
    for (0..8) |_| try appendWave(&pcm, gpa, short, &phase);

    var waves = Waves.init(pcm.items);
    var block = try nextBlock(gpa, &waves, .{});
    defer block.deinit(gpa);
    try std.testing.expectEqualStrings("hi", block.data);
    try std.testing.expectApproxEqAbs(@as(f32, 8), block.speed_error_percent, 1.0);
}

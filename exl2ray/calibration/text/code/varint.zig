//! Variable-length integers as used in many wire formats: seven bits per byte, least significant
//! group first, the top bit set on every byte but the last. Signed values go through zigzag so that
//! -1 takes one byte instead of ten.

const std = @import("std");
const testing = std.testing;

pub const Error = error{
    /// The input ends in the middle of a number.
    Truncated,
    /// More bits than the requested type has.
    Overflow,
    /// A trailing zero group: the same number has a shorter encoding. Accepting it would give
    /// two byte strings, and so two signatures, for one message.
    NotMinimal,
    NoSpace,
};

/// Bytes needed for the largest value of an unsigned type.
pub fn maxLength(comptime T: type) comptime_int {
    return (@bitSizeOf(T) + 6) / 7;
}

/// Writes `value` to the front of `out` and returns the part that was used.
pub fn encode(value: u64, out: []u8) Error![]u8 {
    var rest = value;
    for (out, 0..) |*byte, i| {
        const group: u8 = @intCast(rest & 0x7f);
        rest >>= 7;
        if (rest == 0) {
            byte.* = group;
            return out[0 .. i + 1];
        }
        byte.* = group | 0x80;
    }
    return Error.NoSpace;
}

/// Reads one number and advances `input` past it. On error `input` is left where it was.
pub fn decode(comptime T: type, input: *[]const u8) Error!T {
    var value: u64 = 0;
    for (input.*, 0..) |byte, i| {
        if (i == maxLength(u64)) return Error.Overflow;
        const group: u64 = byte & 0x7f;
        const shift: u6 = @intCast(7 * i);
        if ((group << shift) >> shift != group) return Error.Overflow;
        value |= group << shift;
        if (byte & 0x80 == 0) {
            if (byte == 0 and i > 0) return Error.NotMinimal;
            const narrow = std.math.cast(T, value) orelse return Error.Overflow;
            input.* = input.*[i + 1 ..];
            return narrow;
        }
    }
    return Error.Truncated;
}

pub fn zigzag(n: i64) u64 {
    return @bitCast((n << 1) ^ (n >> 63));
}

pub fn unzigzag(n: u64) i64 {
    const half: i64 = @bitCast(n >> 1);
    return half ^ -@as(i64, @intCast(n & 1));
}

test "round trip at every length boundary" {
    var buffer: [10]u8 = undefined;
    for (0..64) |bit| {
        const power = @as(u64, 1) << @intCast(bit);
        for ([_]u64{ power - 1, power, power +| 1 }) |value| {
            const bytes = try encode(value, &buffer);
            var input: []const u8 = bytes;
            try testing.expectEqual(value, try decode(u64, &input));
            try testing.expectEqual(@as(usize, 0), input.len);
        }
    }
    try testing.expectEqual(10, (try encode(std.math.maxInt(u64), &buffer)).len);
}

test "bad input is refused and not consumed" {
    const cases = [_]struct { bytes: []const u8, want: Error }{
        .{ .bytes = "", .want = Error.Truncated },
        .{ .bytes = "\x96", .want = Error.Truncated },
        .{ .bytes = "\x81\x00", .want = Error.NotMinimal },
        .{ .bytes = "\xac\x02", .want = Error.Overflow }, // 300 does not fit into u8
        .{ .bytes = "\xff\xff\xff\xff\xff\xff\xff\xff\xff\x02", .want = Error.Overflow },
    };
    for (cases) |case| {
        var input = case.bytes;
        try testing.expectError(case.want, decode(u8, &input));
        try testing.expectEqual(case.bytes.len, input.len);
    }
}

test "small negative numbers stay small" {
    var buffer: [10]u8 = undefined;
    for ([_]i64{ 0, -1, 1, -64, 63 }) |n| {
        try testing.expectEqual(1, (try encode(zigzag(n), &buffer)).len);
        try testing.expectEqual(n, unzigzag(zigzag(n)));
    }
    for ([_]i64{ std.math.minInt(i64), std.math.maxInt(i64) }) |n| {
        try testing.expectEqual(n, unzigzag(zigzag(n)));
    }
}

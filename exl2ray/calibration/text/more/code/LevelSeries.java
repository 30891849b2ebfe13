package net.weir.gauge;

import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.ByteOrder;
import java.nio.channels.FileChannel;
import java.nio.file.Path;
import java.nio.file.StandardOpenOption;
import java.time.Instant;
import java.util.Arrays;
import java.util.NoSuchElementException;
import java.util.Objects;
import java.util.PrimitiveIterator;
import java.util.Spliterator;
import java.util.Spliterators;
import java.util.stream.IntStream;
import java.util.stream.StreamSupport;

/**
 * A compressed, append-only series of water levels in millimetres, one file per gauge.
 *
 * <p>Levels are written once a minute and change by a few millimetres, so the differences of the differences
 * are tiny. They are coded as zigzag varints in blocks of {@value #BLOCK} samples; a block can be decoded on its
 * own. A missing sample is coded as the one value which zigzag never yields for a plausible river.
 *
 * <p>Instances are not thread-safe. Several processes may read while one writes: the header count is updated
 * last, and a reader never looks beyond it. The unfinished block of the day is kept in memory only; after a
 * crash the gauge, which remembers two days, is asked for it again.
 */
public final class LevelSeries implements AutoCloseable {

    private static final int MAGIC = 0x5745_4952;   // "WEIR"
    private static final int HEADER = 32;
    private static final int BLOCK = 1440;
    private static final long GAP = 0x7fff_ffffL;

    /** No reading at that minute. */
    public static final int MISSING = Integer.MIN_VALUE;

    private final FileChannel channel;
    private final Instant start;
    private final boolean writable;
    private int samples;
    private long[] blockOffsets = new long[16];
    private int blocks;

    private final int[] pending = new int[BLOCK];
    private int pendingCount;

    private LevelSeries(FileChannel channel, Instant start, boolean writable) {
        this.channel = channel;
        this.start = start;
        this.writable = writable;
    }

    public static LevelSeries create(Path file, Instant start) throws IOException {
        if (start.getEpochSecond() % 60 != 0) {
            throw new IllegalArgumentException("a series starts on a full minute: " + start);
        }
        var channel = FileChannel.open(file, StandardOpenOption.CREATE_NEW, StandardOpenOption.READ,
                StandardOpenOption.WRITE);
        var series = new LevelSeries(channel, start, true);
        series.blockOffsets[0] = HEADER;
        series.writeHeader();
        return series;
    }

    public static LevelSeries open(Path file, boolean writable) throws IOException {
        var channel = writable
                ? FileChannel.open(file, StandardOpenOption.READ, StandardOpenOption.WRITE)
                : FileChannel.open(file, StandardOpenOption.READ);
        try {
            var head = ByteBuffer.allocate(HEADER).order(ByteOrder.LITTLE_ENDIAN);
            readFully(channel, head, 0);
            head.flip();
            if (head.getInt() != MAGIC) {
                throw new IOException(file + " is not a level series");
            }
            var series = new LevelSeries(channel, Instant.ofEpochSecond(head.getLong()), writable);
            series.samples = head.getInt();
            series.index();
            return series;
        } catch (IOException | RuntimeException e) {
            channel.close();
            throw e;
        }
    }

    /** Walks over the block lengths. A thousand blocks are almost three years; that is quick enough. */
    private void index() throws IOException {
        long at = HEADER;
        var len = ByteBuffer.allocate(4).order(ByteOrder.LITTLE_ENDIAN);
        for (int i = 0; i < samples / BLOCK; i++) {
            addOffset(at);
            readFully(channel, len.clear(), at);
            int n = len.flip().getInt();
            if (n <= 0 || n > BLOCK * 5) {
                throw new IOException("block " + i + " claims " + n + " bytes");
            }
            at += 4L + n;
        }
        addOffset(at);
        blocks--;
    }

    private void addOffset(long at) {
        if (blocks == blockOffsets.length) {
            blockOffsets = Arrays.copyOf(blockOffsets, blocks * 2);
        }
        blockOffsets[blocks++] = at;
    }

    /** Appends a reading. Minutes in between that nobody reported are filled with {@link #MISSING}. */
    public void append(Instant minute, int millimetres) throws IOException {
        if (!writable) {
            throw new IllegalStateException("series was opened for reading");
        }
        long index = (minute.getEpochSecond() - start.getEpochSecond()) / 60;
        long next = (long) samples + pendingCount;
        if (index < next) {
            throw new IllegalArgumentException(minute + " is before the end of the series");
        }
        if (index - next > 366L * 1440) {
            throw new IllegalArgumentException("more than a year is missing before " + minute);
        }
        for (; next < index; next++) {
            push(MISSING);
        }
        push(millimetres);
    }

    private void push(int value) throws IOException {
        pending[pendingCount++] = value;
        if (pendingCount == BLOCK) {
            flushBlock();
        }
    }

    private void flushBlock() throws IOException {
        var out = ByteBuffer.allocate(4 + BLOCK * 5).order(ByteOrder.LITTLE_ENDIAN);
        out.putInt(0);
        int last = 0;
        int slope = 0;
        for (int value : pending) {
            if (value == MISSING) {
                putVarint(out, GAP);
                slope = 0;
                continue;
            }
            int delta = value - last;
            putVarint(out, zigzag(delta - slope));
            slope = delta;
            last = value;
        }
        out.putInt(0, out.position() - 4).flip();

        long at = blockOffsets[blocks];
        for (long pos = at; out.hasRemaining(); ) {
            pos += channel.write(out, pos);
        }
        blocks++;
        addOffset(at + out.limit());
        blocks--;
        samples += BLOCK;
        pendingCount = 0;
        channel.force(false);
        writeHeader();
    }

    private void writeHeader() throws IOException {
        var head = ByteBuffer.allocate(HEADER).order(ByteOrder.LITTLE_ENDIAN);
        head.putInt(MAGIC).putLong(start.getEpochSecond()).putInt(samples).position(HEADER).flip();
        channel.write(head, 0);
    }

    /** All levels between two instants, with gaps as {@link #MISSING}. Blocks are decoded as they are needed. */
    public IntStream levels(Instant from, Instant to) {
        Objects.requireNonNull(from);
        int lo = clampIndex(from);
        int hi = clampIndex(to);
        var it = new PrimitiveIterator.OfInt() {
            private int at = lo;
            private int loaded = -1;
            private int[] block;

            @Override
            public boolean hasNext() {
                return at < hi;
            }

            @Override
            public int nextInt() {
                if (at >= hi) {
                    throw new NoSuchElementException();
                }
                int b = at / BLOCK;
                if (b != loaded) {
                    try {
                        block = b < samples / BLOCK ? decode(b) : Arrays.copyOf(pending, pendingCount);
                    } catch (IOException e) {
                        throw new java.io.UncheckedIOException(e);
                    }
                    loaded = b;
                }
                return block[at++ % BLOCK];
            }
        };
        var split = Spliterators.spliterator(it, hi - lo, Spliterator.ORDERED | Spliterator.NONNULL);
        return StreamSupport.intStream(split, false);
    }

    private int clampIndex(Instant t) {
        long i = Math.floorDiv(t.getEpochSecond() - start.getEpochSecond(), 60L);
        return (int) Math.max(0, Math.min(i, (long) samples + pendingCount));
    }

    private int[] decode(int b) throws IOException {
        int size = (int) (blockOffsets[b + 1] - blockOffsets[b] - 4);
        var in = ByteBuffer.allocate(size);
        readFully(channel, in, blockOffsets[b] + 4);
        in.flip();
        int[] values = new int[BLOCK];
        int last = 0;
        int slope = 0;
        for (int i = 0; i < BLOCK; i++) {
            long code = getVarint(in);
            if (code == GAP) {
                values[i] = MISSING;
                slope = 0;
            } else {
                slope += unzigzag(code);
                last += slope;
                values[i] = last;
            }
        }
        if (in.hasRemaining()) {
            throw new IOException("block " + b + " has " + in.remaining() + " bytes too many");
        }
        return values;
    }

    private static long zigzag(int v) {
        return Integer.toUnsignedLong(v << 1 ^ v >> 31);
    }

    private static int unzigzag(long c) {
        return (int) (c >>> 1) ^ -(int) (c & 1);
    }

    private static void putVarint(ByteBuffer out, long v) {
        while (v >= 0x80) {
            out.put((byte) (v | 0x80));
            v >>>= 7;
        }
        out.put((byte) v);
    }

    private static long getVarint(ByteBuffer in) {
        long v = 0;
        for (int shift = 0; ; shift += 7) {
            byte b = in.get();
            v |= (long) (b & 0x7f) << shift;
            if (b >= 0) {
                return v;
            }
        }
    }

    private static void readFully(FileChannel ch, ByteBuffer into, long at) throws IOException {
        while (into.hasRemaining()) {
            int n = ch.read(into, at);
            if (n < 0) {
                throw new IOException("file ends at " + at);
            }
            at += n;
        }
    }

    @Override
    public void close() throws IOException {
        channel.close();
    }
}

// Pigeonloft Relay, a message broker. Apache-2.0; terms in LICENSE.txt.
package org.pigeonloft.relay.store;

import static java.nio.file.StandardOpenOption.CREATE;
import static java.nio.file.StandardOpenOption.READ;
import static java.nio.file.StandardOpenOption.WRITE;

import java.io.Closeable;
import java.io.IOException;
import java.nio.ByteBuffer;
import java.nio.channels.FileChannel;
import java.nio.file.Path;
import java.util.Objects;
import java.util.concurrent.atomic.AtomicLong;
import java.util.zip.CRC32C;

import org.slf4j.Logger;
import org.slf4j.LoggerFactory;

/**
 * A file of messages that is only ever appended to.
 *
 * <p>Each record is {@code length:int, crc:int, sequence:long, payload}. There is one writer, guarded
 * by the broker's partition lock; readers need no lock, because they are never given a position
 * beyond {@link #committed()}.
 *
 * <p>Appending does not make a message durable. The broker collects the messages of a few
 * milliseconds and then calls {@link #sync()} once for all of them; only after that may the producers
 * get their acknowledgements.
 */
public final class JournalSegment implements Closeable {

    private static final Logger LOG = LoggerFactory.getLogger(JournalSegment.class);

    static final int HEADER_BYTES = Integer.BYTES + Integer.BYTES + Long.BYTES;
    static final int MAX_PAYLOAD = 16 << 20;

    private final Path path;
    private final long baseSequence;
    private final long capacity;
    private final FileChannel channel;
    private final ByteBuffer header = ByteBuffer.allocateDirect(HEADER_BYTES);
    private final AtomicLong committed = new AtomicLong();

    private long writePosition;
    private long nextSequence;

    private JournalSegment(Path path, long baseSequence, long capacity, FileChannel channel) {
        this.path = path;
        this.baseSequence = baseSequence;
        this.nextSequence = baseSequence;
        this.capacity = capacity;
        this.channel = channel;
    }

    /**
     * Opens a segment and, if the broker did not shut down cleanly, cuts off what was being written
     * at that moment.
     *
     * @throws CorruptJournalException if a damaged record is followed by intact ones, which no crash
     *     of ours can explain
     */
    public static JournalSegment open(Path path, long baseSequence, long capacity) throws IOException {
        FileChannel channel = FileChannel.open(path, CREATE, READ, WRITE);
        JournalSegment segment = new JournalSegment(path, baseSequence, capacity, channel);
        try {
            segment.recover();
        } catch (IOException | RuntimeException e) {
            try {
                channel.close();
            } catch (IOException suppressed) {
                e.addSuppressed(suppressed);
            }
            throw e;
        }
        return segment;
    }

    private void recover() throws IOException {
        long position = 0;
        long size = channel.size();
        Record record;
        while (position < size && (record = tryRead(position, size)) != null) {
            if (record.sequence() != nextSequence) {
                throw new CorruptJournalException(
                        path + ": expected sequence " + nextSequence + " but found " + record.sequence());
            }
            nextSequence++;
            position += HEADER_BYTES + record.payload().remaining();
        }
        if (position < size) {
            LOG.warn("{}: dropping {} bytes of an unfinished write at {}", path, size - position, position);
            channel.truncate(position);
            channel.force(true);
        }
        writePosition = position;
        committed.set(position);
    }

    /** Returns whether a payload of this size still fits. An empty segment takes anything. */
    public boolean hasRoomFor(int payloadBytes) {
        return writePosition == 0 || writePosition + HEADER_BYTES + payloadBytes <= capacity;
    }

    /**
     * Appends a message.
     *
     * @param payload read from its position to its limit; left unchanged
     * @return the sequence number given to the message
     */
    public long append(ByteBuffer payload) throws IOException {
        Objects.requireNonNull(payload, "payload");
        int length = payload.remaining();
        if (length > MAX_PAYLOAD) {
            throw new MessageTooLargeException(length, MAX_PAYLOAD);
        }

        long sequence = nextSequence;
        header.clear();
        header.putInt(length).putInt(checksum(sequence, payload)).putLong(sequence).flip();

        ByteBuffer[] parts = {header, payload.duplicate()};
        channel.position(writePosition);
        long expected = (long) HEADER_BYTES + length;
        for (long done = 0; done < expected; ) {
            done += channel.write(parts);
        }

        writePosition += expected;
        nextSequence++;
        return sequence;
    }

    /** Makes everything appended so far durable and visible to readers. */
    public void sync() throws IOException {
        long upTo = writePosition;
        if (upTo == committed.get()) {
            return;
        }
        channel.force(false);
        committed.set(upTo);
    }

    /**
     * Reads the record that starts at a position.
     *
     * @return the record, or {@code null} if nothing has been committed there yet
     */
    public Record read(long position) throws IOException {
        long end = committed.get();
        if (position >= end) {
            return null;
        }
        Record record = tryRead(position, end);
        if (record == null) {
            throw new CorruptJournalException(path + ": bad record at " + position);
        }
        return record;
    }

    private Record tryRead(long position, long end) throws IOException {
        if (end - position < HEADER_BYTES) {
            return null;
        }
        ByteBuffer head = ByteBuffer.allocate(HEADER_BYTES);
        readFully(head, position);
        int length = head.getInt();
        int crc = head.getInt();
        long sequence = head.getLong();
        if (length < 0 || length > MAX_PAYLOAD || end - position - HEADER_BYTES < length) {
            return null;
        }
        ByteBuffer payload = ByteBuffer.allocate(length);
        readFully(payload, position + HEADER_BYTES);
        return checksum(sequence, payload) == crc ? new Record(sequence, payload.asReadOnlyBuffer()) : null;
    }

    private void readFully(ByteBuffer into, long position) throws IOException {
        while (into.hasRemaining()) {
            int n = channel.read(into, position);
            if (n < 0) {
                throw new CorruptJournalException(path + ": ended at " + position);
            }
            position += n;
        }
        into.flip();
    }

    private static int checksum(long sequence, ByteBuffer payload) {
        CRC32C crc = new CRC32C();
        ByteBuffer number = ByteBuffer.allocate(Long.BYTES).putLong(0, sequence);
        crc.update(number);
        crc.update(payload.duplicate());
        return (int) crc.getValue();
    }

    public long baseSequence() {
        return baseSequence;
    }

    public long committed() {
        return committed.get();
    }

    @Override
    public void close() throws IOException {
        try (channel) {
            sync();
        }
    }

    @Override
    public String toString() {
        return "JournalSegment[" + path.getFileName() + ", " + baseSequence + ".." + (nextSequence - 1) + "]";
    }

    /** One message as it lies in the journal. */
    public record Record(long sequence, ByteBuffer payload) {}
}

import java.time.DayOfWeek;
import java.time.LocalDate;
import java.util.ArrayDeque;
import java.util.ArrayList;
import java.util.Comparator;
import java.util.Deque;
import java.util.HashMap;
import java.util.List;
import java.util.Map;
import java.util.Objects;
import java.util.Optional;
import java.util.stream.Collectors;

/**
 * The lending desk of a small-town library.
 *
 * <p>Everything that happened is an {@link Event}; the state of a copy is what remains after
 * replaying its events. The desk itself holds no flags such as "is overdue", because such flags
 * would have to be kept in step with the calendar.
 */
public final class LoanDesk {

    /** What can happen to a copy of a book. */
    public sealed interface Event permits Lent, Extended, Returned, Reserved {
        String copy();

        LocalDate day();
    }

    public record Lent(String copy, LocalDate day, String reader, LocalDate due) implements Event {}

    public record Extended(String copy, LocalDate day, LocalDate due) implements Event {}

    public record Returned(String copy, LocalDate day) implements Event {}

    public record Reserved(String copy, LocalDate day, String reader) implements Event {}

    /** A loan that has not come back yet. */
    public record OpenLoan(String copy, String reader, LocalDate due, int extensions) {
        public OpenLoan {
            Objects.requireNonNull(due, "due");
        }

        OpenLoan extendedTo(LocalDate later) {
            return new OpenLoan(copy, reader, later, extensions + 1);
        }
    }

    public static final class RefusedException extends Exception {
        RefusedException(String message) {
            super(message);
        }
    }

    private static final int LOAN_DAYS = 28;
    private static final int MAX_EXTENSIONS = 2;
    private static final int CENTS_PER_DAY = 15;
    private static final int MAX_FINE_CENTS = 600;

    private final List<Event> journal = new ArrayList<>();
    private final Map<String, OpenLoan> open = new HashMap<>();
    private final Map<String, Deque<String>> queue = new HashMap<>();

    private void record(Event event) {
        journal.add(event);
        if (event instanceof Lent lent) {
            open.put(lent.copy(), new OpenLoan(lent.copy(), lent.reader(), lent.due(), 0));
            waiting(lent.copy()).remove(lent.reader());
        } else if (event instanceof Extended extended) {
            open.computeIfPresent(extended.copy(), (copy, loan) -> loan.extendedTo(extended.due()));
        } else if (event instanceof Returned returned) {
            open.remove(returned.copy());
        } else if (event instanceof Reserved reserved) {
            waiting(reserved.copy()).add(reserved.reader());
        }
    }

    private Deque<String> waiting(String copy) {
        return queue.computeIfAbsent(copy, key -> new ArrayDeque<>());
    }

    /** The library is closed on Sundays, so nothing falls due on one. */
    static LocalDate dueAfter(LocalDate day) {
        LocalDate due = day.plusDays(LOAN_DAYS);
        return due.getDayOfWeek() == DayOfWeek.SUNDAY ? due.plusDays(1) : due;
    }

    public LocalDate lend(String copy, String reader, LocalDate today) throws RefusedException {
        OpenLoan loan = open.get(copy);
        if (loan != null) {
            throw new RefusedException(copy + " is out until " + loan.due());
        }
        String next = waiting(copy).peek();
        if (next != null && !next.equals(reader)) {
            throw new RefusedException(copy + " is being held for another reader");
        }
        LocalDate due = dueAfter(today);
        record(new Lent(copy, today, reader, due));
        return due;
    }

    public LocalDate extend(String copy, LocalDate today) throws RefusedException {
        OpenLoan loan = Optional.ofNullable(open.get(copy))
                .orElseThrow(() -> new RefusedException(copy + " is not on loan"));
        if (!waiting(copy).isEmpty()) {
            throw new RefusedException("somebody is waiting for " + copy);
        }
        if (loan.extensions() >= MAX_EXTENSIONS) {
            throw new RefusedException("extended " + loan.extensions() + " times already");
        }
        // Extending early must not shorten a loan, which counting from today alone could do.
        LocalDate due = dueAfter(today).isAfter(loan.due()) ? dueAfter(today) : loan.due();
        record(new Extended(copy, today, due));
        return due;
    }

    public void reserve(String copy, String reader, LocalDate today) throws RefusedException {
        if (!open.containsKey(copy)) {
            throw new RefusedException(copy + " is on the shelf, just take it");
        }
        if (!waiting(copy).contains(reader)) {
            record(new Reserved(copy, today, reader));
        }
    }

    /** Takes a copy back and returns the fine in cents. */
    public int giveBack(String copy, LocalDate today) throws RefusedException {
        OpenLoan loan = open.get(copy);
        if (loan == null) {
            throw new RefusedException(copy + " was not lent");
        }
        long late = Math.max(0, loan.due().datesUntil(today.isAfter(loan.due()) ? today : loan.due())
                .filter(day -> day.plusDays(1).getDayOfWeek() != DayOfWeek.SUNDAY)
                .count());
        record(new Returned(copy, today));
        return (int) Math.min(MAX_FINE_CENTS, late * CENTS_PER_DAY);
    }

    /** Readers to be reminded, each with the overdue copies, longest overdue first. */
    public Map<String, List<String>> reminders(LocalDate today) {
        return open.values().stream()
                .filter(loan -> loan.due().isBefore(today))
                .sorted(Comparator.comparing(OpenLoan::due).thenComparing(OpenLoan::copy))
                .collect(Collectors.groupingBy(
                        OpenLoan::reader, Collectors.mapping(OpenLoan::copy, Collectors.toList())));
    }

    public static void main(String[] args) throws RefusedException {
        LoanDesk desk = new LoanDesk();
        LocalDate monday = LocalDate.of(2024, 3, 4);
        System.out.println("due " + desk.lend("moby-dick/2", "ines", monday));
        desk.reserve("moby-dick/2", "tariq", monday.plusDays(3));
        try {
            desk.extend("moby-dick/2", monday.plusDays(20));
        } catch (RefusedException refused) {
            System.out.println("refused: " + refused.getMessage());
        }
        System.out.println("remind " + desk.reminders(monday.plusDays(30)));
        System.out.println("fine " + desk.giveBack("moby-dick/2", monday.plusDays(35)) + " cents");
        System.out.println("due " + desk.lend("moby-dick/2", "tariq", monday.plusDays(36)));
    }
}

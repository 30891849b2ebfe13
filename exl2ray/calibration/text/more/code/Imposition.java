package uk.oldmill.bindery;

import java.util.ArrayList;
import java.util.Collections;
import java.util.List;
import java.util.Objects;

/**
 * Works out which page goes where when a book is printed as folded sections.
 *
 * <p>A sheet folded {@code n} times has {@code 2^n} leaves and twice as many pages. Printed flat, the pages look
 * shuffled and half of them stand on their heads. Rather than keep the tables that every binder's manual prints,
 * this class folds an imaginary sheet: it stacks the panels the way a folding machine would and then reads the
 * page numbers off from the outside in.
 *
 * <p>Instances are immutable.
 */
public final class Imposition {

    /** One panel on one side of the flat sheet. */
    public record Panel(int row, int column, int page, boolean upsideDown) {}

    /** What the printer needs: both sides of a sheet, panels in reading order, the back as seen after turning it left to right. */
    public record Sheet(int section, List<Panel> front, List<Panel> back) {}

    private enum Fold { LEFT_OVER_RIGHT, BOTTOM_OVER_TOP }

    /** A panel somewhere in the half-folded stack. {@code faceUp}: the front of the sheet looks at the ceiling. */
    private record Layer(int row, int column, boolean faceUp, boolean turned) {
        Layer flipped(boolean alsoTurned) {
            return new Layer(row, column, !faceUp, turned != alsoTurned);
        }
    }

    private final int rows;
    private final int columns;
    private final List<Fold> folds;

    private Imposition(int rows, int columns, List<Fold> folds) {
        this.rows = rows;
        this.columns = columns;
        this.folds = List.copyOf(folds);
    }

    /** One fold: four pages to the sheet. */
    public static Imposition folio() {
        return new Imposition(1, 2, List.of(Fold.LEFT_OVER_RIGHT));
    }

    /** Two folds, eight pages. The last fold makes the spine, so it is always the vertical one. */
    public static Imposition quarto() {
        return new Imposition(2, 2, List.of(Fold.BOTTOM_OVER_TOP, Fold.LEFT_OVER_RIGHT));
    }

    /** Three folds, sixteen pages. */
    public static Imposition octavo() {
        return new Imposition(2, 4, List.of(Fold.LEFT_OVER_RIGHT, Fold.BOTTOM_OVER_TOP, Fold.LEFT_OVER_RIGHT));
    }

    public int pagesPerSheet() {
        return 2 * rows * columns;
    }

    /**
     * Plans a whole book. The last section is filled up with page number 0, which the caller prints blank.
     *
     * @throws IllegalArgumentException if {@code pages} is not positive
     */
    public List<Sheet> impose(int pages) {
        if (pages < 1) {
            throw new IllegalArgumentException("a book of " + pages + " pages");
        }
        List<Layer> stack = fold();
        List<Sheet> sheets = new ArrayList<>();
        for (int first = 1; first <= pages; first += pagesPerSheet()) {
            sheets.add(number(stack, sheets.size() + 1, first, pages));
        }
        return sheets;
    }

    /** The panels from the bottom of the folded pile to its top. */
    private List<Layer> fold() {
        // pile.get(r).get(c) is the stack lying on panel (r, c) of what is left of the sheet.
        List<List<List<Layer>>> pile = new ArrayList<>();
        for (int r = 0; r < rows; r++) {
            List<List<Layer>> line = new ArrayList<>();
            for (int c = 0; c < columns; c++) {
                line.add(List.of(new Layer(r, c, true, false)));
            }
            pile.add(line);
        }
        for (Fold f : folds) {
            int height = pile.size();
            int width = pile.get(0).size();
            boolean sideways = f == Fold.LEFT_OVER_RIGHT;
            List<List<List<Layer>>> next = new ArrayList<>();
            for (int r = 0; r < (sideways ? height : height / 2); r++) {
                List<List<Layer>> line = new ArrayList<>();
                for (int c = sideways ? width / 2 : 0; c < width; c++) {
                    List<Layer> moving = sideways ? pile.get(r).get(width - 1 - c) : pile.get(height - 1 - r).get(c);
                    line.add(laidOn(pile.get(r).get(c), moving, !sideways));
                }
                next.add(line);
            }
            pile = next;
        }
        return Objects.requireNonNull(pile.get(0).get(0));
    }

    /** Folding over turns the moving stack bottom up; folding upwards also puts its pages on their heads. */
    private static List<Layer> laidOn(List<Layer> resting, List<Layer> moving, boolean turns) {
        List<Layer> result = new ArrayList<>(resting);
        List<Layer> reversed = new ArrayList<>(moving);
        Collections.reverse(reversed);
        reversed.forEach(layer -> result.add(layer.flipped(turns)));
        return result;
    }

    private Sheet number(List<Layer> stack, int section, int first, int pages) {
        List<Panel> front = new ArrayList<>();
        List<Panel> back = new ArrayList<>();
        int page = first;
        for (int i = stack.size() - 1; i >= 0; i--) {
            Layer layer = stack.get(i);
            int recto = page <= pages ? page : 0;
            int verso = page + 1 <= pages ? page + 1 : 0;
            page += 2;
            int mirrored = columns - 1 - layer.column();
            front.add(new Panel(layer.row(), layer.column(), layer.faceUp() ? recto : verso, layer.turned()));
            back.add(new Panel(layer.row(), mirrored, layer.faceUp() ? verso : recto, layer.turned()));
        }
        return new Sheet(section, inReadingOrder(front), inReadingOrder(back));
    }

    private List<Panel> inReadingOrder(List<Panel> panels) {
        return panels.stream().sorted((a, b) -> (a.row() * columns + a.column()) - (b.row() * columns + b.column())).toList();
    }
}

/// Cutting lists for the garden joinery. Timber comes in a few stock lengths; we look for the assignment of
/// pieces to boards with the least waste, and print what the sawyer needs.
module Pergola.Cutting

open System
open System.Collections.Generic

[<Measure>] type mm
[<Measure>] type pence

[<RequireQualifiedAccess>]
type Section =
    | Post   // 100 x 100
    | Rail   // 47 x 150
    | Batten // 25 x 38

    static member All = [ Post; Rail; Batten ]

type Piece = { Label: string; Section: Section; Length: int<mm> }

type Stock = { Length: int<mm>; Price: int<pence> }

type Board = { From: Stock; Pieces: Piece list }

type Fault =
    | TooLong of Piece * longest: int<mm>
    | NoStock of Section

let private kerf = 3<mm>
let private squareOff = 5<mm>   // both ends of a board are trimmed before measuring

module Board =
    let empty stock = { From = stock; Pieces = [] }

    let used board =
        board.Pieces |> List.sumBy (fun p -> p.Length + kerf)

    let usable (stock: Stock) = stock.Length - 2 * squareOff

    let rest board =
        // The last piece needs no cut behind it if it comes out exactly.
        usable board.From - used board + kerf

    let fits (piece: Piece) board = used board + piece.Length <= usable board.From

    let add piece board = { board with Pieces = piece :: board.Pieces }

    /// Try a cheaper stock length for what has ended up on this board.
    let shrink stocks board =
        stocks
        |> Seq.filter (fun s -> used board - kerf <= usable s)
        |> Seq.minBy (fun s -> s.Price)
        |> fun s -> { board with From = s }

let private cost boards = boards |> List.sumBy (fun b -> b.From.Price)

/// Best fit decreasing: a decent plan at once, and the bound for the search below.
let private greedy stocks (pieces: Piece list) =
    let longest = stocks |> List.maxBy (fun (s: Stock) -> s.Length)

    let place boards piece =
        match boards |> List.filter (Board.fits piece) with
        | [] -> Board.add piece (Board.empty longest) :: boards
        | open' ->
            let best = open' |> List.minBy Board.rest
            Board.add piece best :: (boards |> List.filter (fun b -> not (obj.ReferenceEquals(b, best))))

    pieces
    |> List.sortByDescending (fun p -> p.Length)
    |> List.fold place []
    |> List.map (Board.shrink stocks)

/// Branch and bound over the pieces, longest first. Two boards with the same rest are the same choice, and a
/// piece no longer than the one before it never needs an earlier board.
let private search (deadline: TimeSpan) stocks (pieces: Piece list) =
    let watch = Diagnostics.Stopwatch.StartNew()
    let mutable best = greedy stocks pieces
    let mutable bestCost = cost best
    let longest = stocks |> List.maxBy (fun (s: Stock) -> s.Length)
    let perMm =
        stocks |> List.map (fun s -> float s.Price / float (Board.usable s)) |> List.min

    let rec go boards todo (left: int<mm>) =
        if watch.Elapsed < deadline then
            match todo with
            | [] ->
                let plan = boards |> List.map (Board.shrink stocks)
                if cost plan < bestCost then
                    best <- plan
                    bestCost <- cost plan
            | piece :: later ->
                let soFar = boards |> List.sumBy (fun b -> float (Board.used b)) |> (*) perMm
                if soFar + perMm * float left < float bestCost then
                    let seen = HashSet<int<mm>>()
                    for i, b in List.indexed boards do
                        if Board.fits piece b && seen.Add(Board.rest b) then
                            go (List.updateAt i (Board.add piece b) boards) later (left - piece.Length)
                    go (Board.add piece (Board.empty longest) :: boards) later (left - piece.Length)

    let sorted = pieces |> List.sortByDescending (fun p -> p.Length)
    go [] sorted (sorted |> List.sumBy (fun p -> p.Length))
    best, watch.Elapsed < deadline

let plan (stockOf: Section -> Stock list) (pieces: Piece list) =
    let check (piece: Piece) =
        match stockOf piece.Section with
        | [] -> Error(NoStock piece.Section)
        | stocks ->
            let longest = stocks |> List.map Board.usable |> List.max
            if piece.Length > longest then Error(TooLong(piece, longest)) else Ok piece

    let faults = pieces |> List.map check |> List.choose (function Error e -> Some e | Ok _ -> None)

    if not (List.isEmpty faults) then
        Error(List.distinct faults)
    else
        pieces
        |> List.groupBy (fun p -> p.Section)
        |> List.map (fun (section, ps) ->
            let boards, proved = search (TimeSpan.FromSeconds 2.0) (stockOf section) ps
            section, boards, proved)
        |> Ok

let print result =
    match result with
    | Error faults ->
        for fault in faults do
            match fault with
            | TooLong(p, longest) ->
                printfn "%s: %d mm, but no board yields more than %d mm" p.Label p.Length longest
            | NoStock s -> printfn "no stock given for %A" s
    | Ok sections ->
        for section, boards, proved in sections do
            printfn "%A: %d boards, %.2f pounds%s" section boards.Length
                (float (cost boards) / 100.0)
                (if proved then "" else " (perhaps not the cheapest)")
            for board, copies in boards |> List.countBy (fun b -> { b with Pieces = List.sort b.Pieces }) do
                let cuts = board.Pieces |> List.map (fun p -> $"{p.Label} {p.Length}") |> String.concat "  "
                printfn "  %d x %d mm:  %s   rest %d" copies board.From.Length cuts (Board.rest board)

(* Reader for plain-text double-entry ledgers.

     2024-02-11 ! Chandler's | rope, two shackles
         expenses:boat:rigging     £38.40
         expenses:boat:hardware     £9.10
         assets:purse

   One posting per transaction may omit its amount; it then takes whatever balances the rest. *)

type commodity = string

type amount = { quantity : int; (* in hundredths *) commodity : commodity }

type posting = { account : string list; amount : amount option }

type transaction = {
  line : int;
  date : int * int * int;
  pending : bool;
  payee : string;
  note : string option;
  postings : posting list;
}

exception Bad of int * string

let fail line fmt = Printf.ksprintf (fun s -> raise (Bad (line, s))) fmt

module Balance = Map.Make (String)

let add { quantity; commodity } balance =
  Balance.update commodity
    (fun old ->
      match Option.value old ~default:0 + quantity with
      | 0 -> None
      | n -> Some n)
    balance

let negate = Balance.map (fun q -> -q)

(* Lexical odds and ends -------------------------------------------------- *)

let is_digit c = c >= '0' && c <= '9'

let parse_amount line text =
  let text = String.trim text in
  let n = String.length text in
  let rec find_digit i =
    if i >= n then fail line "no digits in amount %S" text
    else if is_digit text.[i] then i
    else find_digit (i + 1)
  in
  let first = find_digit 0 in
  let prefix = String.sub text 0 first in
  let negative = String.contains prefix '-' in
  let symbol =
    String.concat "" (String.split_on_char '-' prefix) |> String.trim
  in
  let body = String.sub text first (n - first) in
  let number, suffix =
    match String.index_opt body ' ' with
    | Some i -> (String.sub body 0 i, String.trim (String.sub body i (String.length body - i)))
    | None -> (body, "")
  in
  let commodity =
    match (symbol, suffix) with
    | "", "" -> fail line "amount %S of what?" text
    | s, "" | "", s -> s
    | s, t -> fail line "both %S and %S in one amount" s t
  in
  let hundredths s =
    match String.length s with
    | 0 -> 0
    | 1 -> 10 * int_of_string s
    | 2 -> int_of_string ("0u" ^ s)
    | _ -> fail line "more than two decimals: %S" text
  in
  let plain = String.concat "" (String.split_on_char ',' number) in
  match List.map String.trim (String.split_on_char '.' plain) with
  | [ whole ] -> { quantity = (if negative then -100 else 100) * int_of_string whole; commodity }
  | [ whole; frac ] ->
      let q = (100 * int_of_string whole) + hundredths frac in
      { quantity = (if negative then -q else q); commodity }
  | _ -> fail line "too many points in %S" text

let parse_posting line text =
  (* two blanks separate account and amount, so that account names may contain one *)
  let rec split i =
    if i + 1 >= String.length text then (text, None)
    else if text.[i] = ' ' && text.[i + 1] = ' ' then
      (String.sub text 0 i, Some (String.sub text i (String.length text - i)))
    else split (i + 1)
  in
  let account, rest = split 0 in
  let amount =
    match Option.map String.trim rest with
    | None | Some "" -> None
    | Some a -> Some (parse_amount line a)
  in
  { account = String.split_on_char ':' account; amount }

let parse_header line text =
  try
    Scanf.sscanf text "%4d-%2d-%2d %[!*]%[^\n]" (fun y m d flag rest ->
        if m < 1 || m > 12 || d < 1 || d > 31 then fail line "no such day";
        let payee, note =
          match String.index_opt rest '|' with
          | None -> (String.trim rest, None)
          | Some i ->
              ( String.trim (String.sub rest 0 i),
                Some (String.trim (String.sub rest (i + 1) (String.length rest - i - 1))) )
        in
        { line; date = (y, m, d); pending = flag = "!"; payee; note; postings = [] })
  with Scanf.Scan_failure _ | End_of_file | Failure _ ->
    fail line "expected a date, found %S" text

(* Balancing ---------------------------------------------------------------- *)

let settle t =
  let sum =
    List.fold_left
      (fun b p -> match p.amount with Some a -> add a b | None -> b)
      Balance.empty t.postings
  in
  match List.filter (fun p -> p.amount = None) t.postings with
  | [] when Balance.is_empty sum -> t
  | [] ->
      let c, q = Balance.choose sum in
      fail t.line "%s: out of balance by %s%.2f" t.payee c (float q /. 100.)
  | [ hole ] ->
      let filled =
        Balance.bindings (negate sum)
        |> List.map (fun (commodity, quantity) ->
               { hole with amount = Some { quantity; commodity } })
      in
      let others = List.filter (fun p -> p.amount <> None) t.postings in
      { t with postings = others @ filled }
  | _ -> fail t.line "%s: more than one amount left out" t.payee

let read channel =
  let finish acc = function
    | None -> acc
    | Some t -> settle { t with postings = List.rev t.postings } :: acc
  in
  let rec go line current acc =
    match In_channel.input_line channel with
    | None -> List.rev (finish acc current)
    | Some text -> (
        let text = match String.index_opt text ';' with Some i -> String.sub text 0 i | None -> text in
        match (String.trim text, current) with
        | "", _ -> go (line + 1) None (finish acc current)
        | body, Some t when text.[0] = ' ' || text.[0] = '\t' ->
            go (line + 1) (Some { t with postings = parse_posting line body :: t.postings }) acc
        | body, None when text.[0] = ' ' -> fail line "posting %S without a transaction" body
        | body, _ -> go (line + 1) (Some (parse_header line body)) (finish acc current))
  in
  go 1 None []

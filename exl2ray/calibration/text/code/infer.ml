(* Hindley-Milner type inference for a tiny lambda calculus, with levels instead of scanning the
   environment.

   To generalise a let-bound type one needs the variables that do not occur in the environment.
   Searching the environment at each let is quadratic. Instead every unknown carries the depth of
   the let in which it was created; unification lowers that number when the unknown escapes into an
   outer scope. What still has a deeper level at the end of the let is free to be generalised. *)

type ty =
  | Const of string
  | Arrow of ty * ty
  | Var of tvar ref
  | Gen of int  (* a quantified variable inside a scheme *)

and tvar =
  | Unbound of int * int  (* identity, level *)
  | Link of ty

type expr =
  | Int of int
  | Bool of bool
  | Name of string
  | Lam of string * expr
  | App of expr * expr
  | Let of string * expr * expr
  | If of expr * expr * expr

exception Type_error of string

let fail fmt = Printf.ksprintf (fun s -> raise (Type_error s)) fmt

let counter = ref 0

let fresh level =
  incr counter;
  Var (ref (Unbound (!counter, level)))

(* Follows links and shortens the chain on the way, as union-find does. *)
let rec repr = function
  | Var ({ contents = Link t } as r) ->
      let t = repr t in
      r := Link t;
      t
  | t -> t

let to_string t =
  let names = Hashtbl.create 8 in
  let name id =
    match Hashtbl.find_opt names id with
    | Some n -> n
    | None ->
        let n = Printf.sprintf "'%c" (Char.chr (Char.code 'a' + (Hashtbl.length names mod 26))) in
        Hashtbl.add names id n;
        n
  in
  let rec go nested t =
    match repr t with
    | Const c -> c
    | Gen i -> name (-i - 1)
    | Var { contents = Unbound (id, _) } -> name id
    | Var { contents = Link _ } -> assert false
    | Arrow (a, b) ->
        (* Force the argument first: OCaml evaluates operands right to left, and the letters
           should appear in reading order. *)
        let left = go true a in
        let s = left ^ " -> " ^ go false b in
        if nested then "(" ^ s ^ ")" else s
  in
  go false t

(* Occurs check and level adjustment in one traversal. *)
let rec prepare id level t =
  match repr t with
  | Const _ | Gen _ -> ()
  | Arrow (a, b) ->
      prepare id level a;
      prepare id level b
  | Var ({ contents = Unbound (id', level') } as r) ->
      if id = id' then raise Exit;
      if level' > level then r := Unbound (id', level)
  | Var { contents = Link _ } -> assert false

let rec unify a b =
  match (repr a, repr b) with
  | a, b when a == b -> ()
  | Const c, Const d when c = d -> ()
  | Arrow (a1, a2), Arrow (b1, b2) ->
      unify a1 b1;
      unify a2 b2
  | Var ({ contents = Unbound (id, level) } as r), t
  | t, Var ({ contents = Unbound (id, level) } as r) ->
      (match prepare id level t with
       | () -> r := Link t
       | exception Exit -> fail "infinite type: %s occurs in %s" (to_string (Var r)) (to_string t))
  | a, b -> fail "cannot use %s where %s is expected" (to_string a) (to_string b)

let generalise level t =
  let seen = ref [] in
  let rec go t =
    match repr t with
    | Var { contents = Unbound (id, l) } when l > level ->
        (match List.assoc_opt id !seen with
         | Some i -> Gen i
         | None ->
             let i = List.length !seen in
             seen := (id, i) :: !seen;
             Gen i)
    | Arrow (a, b) ->
        let a = go a in
        Arrow (a, go b)
    | t -> t
  in
  go t

let instantiate level scheme =
  let copies = Hashtbl.create 4 in
  let rec go = function
    | Gen i ->
        if not (Hashtbl.mem copies i) then Hashtbl.add copies i (fresh level);
        Hashtbl.find copies i
    | Arrow (a, b) -> Arrow (go a, go b)
    | t -> t
  in
  go scheme

let rec infer env level = function
  | Int _ -> Const "int"
  | Bool _ -> Const "bool"
  | Name x -> (
      match List.assoc_opt x env with
      | Some scheme -> instantiate level scheme
      | None -> fail "%s is not defined" x)
  | Lam (x, body) ->
      let arg = fresh level in
      Arrow (arg, infer ((x, arg) :: env) level body)
  | App (f, a) ->
      let tf = infer env level f in
      let ta = infer env level a in
      let result = fresh level in
      (* what we have comes first, what is wanted second: the error message relies on it *)
      unify (Arrow (ta, result)) tf;
      result
  | Let (x, bound, body) ->
      let t = infer env (level + 1) bound in
      infer ((x, generalise level t) :: env) level body
  | If (c, yes, no) ->
      unify (infer env level c) (Const "bool");
      let t = infer env level yes in
      unify (infer env level no) t;
      t

let prelude =
  let int = Const "int" in
  [ ("add", Arrow (int, Arrow (int, int))); ("less", Arrow (int, Arrow (int, Const "bool"))) ]

let type_of e = try to_string (infer prelude 0 e) with Type_error m -> "error: " ^ m

let () =
  let id = Lam ("x", Name "x") in
  let compose = Lam ("f", Lam ("g", Lam ("x", App (Name "f", App (Name "g", Name "x"))))) in
  let check expected e =
    let got = type_of e in
    if got <> expected then (Printf.eprintf "expected %s\n     got %s\n" expected got; exit 1)
  in
  check "'a -> 'a" id;
  check "('a -> 'b) -> ('c -> 'a) -> 'c -> 'b" compose;
  (* id is used at two different types, which only generalisation makes possible *)
  check "int" (Let ("id", id, If (App (Name "id", Bool true), App (Name "id", Int 1), Int 0)));
  (* ... while a lambda-bound variable stays monomorphic *)
  check "error: cannot use bool where int is expected"
    (Lam ("f", If (App (Name "f", Int 1), Bool true, App (Name "f", Bool false))));
  check "error: infinite type: 'a occurs in 'a -> 'b" (Lam ("x", App (Name "x", Name "x")));
  check "int -> bool" (App (Name "less", Int 3));
  print_endline "all types as expected"

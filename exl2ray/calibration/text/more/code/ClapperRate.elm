module ClapperRate exposing (main)

{-| A page for sound people at a small film festival: tap along, get the frame rate of the projector.

Old reels were cranked by hand, and the leader seldom says how fast. The operator taps the space bar at each flash of
the beam, and the page proposes the shutter and rate that fit.

-}

import Browser
import Browser.Events
import Html exposing (Html, button, div, h1, li, ol, p, span, text)
import Html.Attributes exposing (attribute, class, disabled)
import Html.Events exposing (onClick)
import Json.Decode as Decode exposing (Decoder)
import Task
import Time


type alias Model =
    { taps : List Int
    , blades : Blades
    , locked : Maybe Float
    }


type Blades
    = Two
    | Three


type Msg
    = KeyPressed
    | TappedAt Time.Posix
    | BladesChosen Blades
    | Locked Float
    | Cleared


init : () -> ( Model, Cmd Msg )
init _ =
    ( { taps = [], blades = Three, locked = Nothing }, Cmd.none )


update : Msg -> Model -> ( Model, Cmd Msg )
update msg model =
    case msg of
        KeyPressed ->
            ( model, Task.perform TappedAt Time.now )

        TappedAt now ->
            let
                ms =
                    Time.posixToMillis now

                -- A pause of two seconds begins a new count.
                earlier =
                    case model.taps of
                        last :: _ ->
                            if ms - last > 2000 then
                                []

                            else
                                model.taps

                        [] ->
                            []
            in
            ( { model | taps = List.take 32 (ms :: earlier) }, Cmd.none )

        BladesChosen blades ->
            ( { model | blades = blades }, Cmd.none )

        Locked rate ->
            ( { model | locked = Just rate }, Cmd.none )

        Cleared ->
            ( { model | taps = [], locked = Nothing }, Cmd.none )


{-| Median of the gaps, since one missed flash would spoil the mean. `Nothing` below five taps.
-}
medianGap : List Int -> Maybe Float
medianGap taps =
    let
        gaps =
            List.map2 (-) taps (List.drop 1 taps) |> List.sort

        n =
            List.length gaps
    in
    if n < 4 then
        Nothing

    else
        gaps
            |> List.drop ((n - 1) // 2)
            |> List.take (2 - modBy 2 n)
            |> (\middle -> Just (toFloat (List.sum middle) / toFloat (List.length middle)))


{-| Nobody taps faster than about eight times a second, so the operator follows every k-th flash and we try each k.
-}
candidates : Blades -> Float -> List { every : Int, rate : Float }
candidates blades gap =
    let
        flashes =
            case blades of
                Two ->
                    2

                Three ->
                    3
    in
    List.range 4 24
        |> List.map (\k -> { every = k, rate = 1000 * toFloat k / (gap * flashes) })
        |> List.filter (\c -> c.rate >= 12 && c.rate <= 30)
        |> List.sortBy (\c -> abs (c.rate - toFloat (round c.rate)))
        |> List.take 3


view : Model -> Html Msg
view model =
    div [ class "bench" ]
        [ h1 [] [ text "How fast was it cranked?" ]
        , div [ attribute "role" "radiogroup", attribute "aria-label" "Shutter blades" ]
            [ bladeButton model Two "two blades"
            , bladeButton model Three "three blades"
            ]
        , case medianGap model.taps of
            Nothing ->
                p [] [ text (String.fromInt (5 - List.length model.taps) ++ " more taps, please") ]

            Just gap ->
                ol [] (List.map viewCandidate (candidates model.blades gap))
        , case model.locked of
            Just rate ->
                p [ class "locked" ] [ text ("Set the motor to " ++ decimal rate ++ " frames a second.") ]

            Nothing ->
                text ""
        , button [ onClick Cleared, disabled (List.isEmpty model.taps) ] [ text "Start again" ]
        ]


viewCandidate : { every : Int, rate : Float } -> Html Msg
viewCandidate c =
    li []
        [ button [ onClick (Locked c.rate) ] [ text (decimal c.rate) ]
        , span [ class "note" ] [ text (" if you tapped every " ++ String.fromInt c.every ++ "th flash") ]
        ]


bladeButton : Model -> Blades -> String -> Html Msg
bladeButton model blades label =
    button
        [ onClick (BladesChosen blades)
        , attribute "role" "radio"
        , attribute "aria-checked"
            (if model.blades == blades then
                "true"

             else
                "false"
            )
        ]
        [ text label ]


decimal : Float -> String
decimal x =
    let
        tenths =
            round (x * 10)
    in
    String.fromInt (tenths // 10) ++ "." ++ String.fromInt (modBy 10 tenths)


spaceBar : Decoder Msg
spaceBar =
    Decode.map2 Tuple.pair (Decode.field "key" Decode.string) (Decode.field "repeat" Decode.bool)
        |> Decode.andThen
            (\pressed ->
                if pressed == ( " ", False ) then
                    Decode.succeed KeyPressed

                else
                    Decode.fail "some other key"
            )


main : Program () Model Msg
main =
    Browser.element
        { init = init
        , update = update
        , view = view
        , subscriptions = \_ -> Browser.Events.onKeyDown spaceBar
        }

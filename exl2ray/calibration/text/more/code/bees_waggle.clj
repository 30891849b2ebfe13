(ns apiary.waggle
  "Decodes waggle dances from tracked video and maps where a colony forages.

  A dance is a run of frames in which one bee waggles; the angle against gravity is the direction relative to
  the sun, the duration is the distance. Tracks come in as maps from the tracker, one per frame and bee."
  (:require [clojure.java.io :as io]
            [clojure.set :as set]
            [clojure.spec.alpha :as s]
            [clojure.string :as str])
  (:import (java.time Duration Instant ZoneOffset)))

(s/def ::bee pos-int?)
(s/def ::at inst?)
(s/def ::heading (s/double-in :min 0.0 :max 360.0 :NaN? false))   ; clockwise from straight up on the comb
(s/def ::wag-hz (s/nilable (s/double-in :min 0.0 :max 60.0)))
(s/def ::frame (s/keys :req-un [::bee ::at ::heading ::wag-hz]))

(def ^:private hive {:lat 47.6512 :lon 9.4801})

(def ^:private calibration
  "Metres per second of waggling, fitted to marked bees at feeders. Not linear near the hive: below some
  hundred metres bees dance rounds and there is nothing to decode."
  {:slope 1040.0 :intercept -95.0 :shortest 0.35})

(defn- waggling? [{:keys [wag-hz]}]
  (and wag-hz (<= 10.0 wag-hz 18.0)))

(defn- radians [deg] (* deg (/ Math/PI 180.0)))
(defn- degrees [rad] (mod (* rad (/ 180.0 Math/PI)) 360.0))

(defn circular-mean
  "Mean of angles in degrees with the length of the resultant: 1 when all agree, 0 when they cancel out."
  [angles]
  (let [n  (count angles)
        sx (/ (transduce (map #(Math/cos (radians %))) + angles) n)
        sy (/ (transduce (map #(Math/sin (radians %))) + angles) n)]
    {:angle (degrees (Math/atan2 sy sx))
     :r     (Math/hypot sx sy)}))

(defn- ms-between [a b]
  (.toMillis (Duration/between (:at a) (:at b))))

(defn runs
  "Splits the frames of one bee into waggle runs. A gap of up to 80 ms is forgiven: the tracker loses a bee when
  another climbs over her."
  [frames]
  (->> frames
       (filter waggling?)
       (reduce (fn [acc frame]
                 (let [open (peek acc)]
                   (if (and open (<= (ms-between (peek open) frame) 80))
                     (conj (pop acc) (conj open frame))
                     (conj acc [frame]))))
               [])
       (filter #(>= (count %) 5))))

(defn- run->vector [run]
  (let [{:keys [angle r]} (circular-mean (map :heading run))]
    (when (> r 0.9)
      {:at       (:at (first run))
       :angle    angle
       :duration (/ (ms-between (first run) (peek run)) 1000.0)})))

(defn dances
  "Groups the runs of a bee into dances: runs that follow each other within four seconds. Dances of fewer than
  three runs are dropped, as are ones whose runs disagree."
  [frames]
  (let [vectors (keep run->vector (runs frames))]
    (->> vectors
         (reduce (fn [acc v]
                   (let [d (peek acc)]
                     (if (and d (< (ms-between (peek d) v) 4000))
                       (conj (pop acc) (conj d v))
                       (conj acc [v]))))
                 [])
         (filter #(>= (count %) 3))
         (keep (fn [d]
                 (let [{:keys [angle r]} (circular-mean (map :angle d))
                       secs (sort (map :duration d))]
                   (when (> r 0.8)
                     {:at       (:at (first d))
                      :angle    angle
                      :spread   (degrees (Math/sqrt (* -2.0 (Math/log r))))
                      :duration (nth secs (quot (count secs) 2))
                      :runs     (count d)})))))))

(defn sun-azimuth
  "Azimuth of the sun in degrees from north. Low precision (about half a degree), which is twenty times better
  than the bees are."
  [^Instant at {:keys [lat lon]}]
  (let [days (/ (- (.getEpochSecond at) 946728000) 86400.0)
        g    (radians (mod (+ 357.529 (* 0.98560028 days)) 360))
        q    (mod (+ 280.459 (* 0.98564736 days)) 360)
        l    (radians (+ q (* 1.915 (Math/sin g)) (* 0.020 (Math/sin (* 2 g)))))
        e    (radians (- 23.439 (* 3.6e-7 days)))
        ra   (Math/atan2 (* (Math/cos e) (Math/sin l)) (Math/cos l))
        dec  (Math/asin (* (Math/sin e) (Math/sin l)))
        gmst (mod (+ 280.46062 (* 360.98564737 days)) 360)
        h    (- (radians (+ gmst lon)) ra)
        phi  (radians lat)]
    (degrees (Math/atan2 (- (Math/sin h))
                         (- (* (Math/tan dec) (Math/cos phi))
                            (* (Math/sin phi) (Math/cos h)))))))

(defn locate
  "Where a dance points to, relative to the hive, or nil if it is a round dance."
  [{:keys [at angle duration] :as dance}]
  (let [{:keys [slope intercept shortest]} calibration]
    (when (>= duration shortest)
      (let [bearing (mod (+ angle (sun-azimuth at hive)) 360.0)
            metres  (+ intercept (* slope duration))]
        (assoc dance
               :bearing bearing
               :metres  metres
               :east    (* metres (Math/sin (radians bearing)))
               :north   (* metres (Math/cos (radians bearing))))))))

(defn heat
  "Counts dances per hectare cell. Every dance is smeared over the cells that it may mean, as a dance is no
  more than a hint: sixteen bearings within its own spread, each worth a sixteenth."
  [located]
  (letfn [(cells [{:keys [bearing metres spread]}]
            (for [i (range 16)
                  :let [b (radians (+ bearing (* spread (- (/ (+ i 0.5) 8.0) 1.0))))]]
              [[(long (Math/floor (/ (* metres (Math/sin b)) 100.0)))
                (long (Math/floor (/ (* metres (Math/cos b)) 100.0)))]
               0.0625]))]
    (->> located
         (mapcat cells)
         (reduce (fn [m [cell w]] (update m cell (fnil + 0.0) w)) {}))))

(defn favourite-fields [fields located]
  (let [grid (heat located)]
    (->> fields
         (map (fn [{:keys [name cells]}]
                [name (transduce (map #(get grid % 0.0)) + (set/intersection (set (keys grid)) cells))]))
         (sort-by val >)
         (take-while (comp pos? second)))))

(comment
  (with-open [r (io/reader "tracks-2021-05-14.edn")]
    (->> (line-seq r)
         (map #(read-string {:readers {'inst (fn [t] (Instant/parse t))}} %))
         (filter #(s/valid? ::frame %))
         (group-by :bee)
         vals
         (mapcat dances)
         (keep locate)
         heat
         (sort-by val >)
         (take 5)))
  ;; => ([[3 -7] 11.4] [[4 -7] 9.1] ...   the rape field behind the brickworks
  )

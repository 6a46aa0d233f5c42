defmodule StarweaveImage.Sidecar.Life do
  @moduledoc false
  # The life of a sidecar, from one Python process to the next: its state, what each event makes of it, and what the
  # owner has to do then. The whole table is in docs/architecture.md, and a test holds this module to it. No process and
  # no clock; the random numbers of the pauses are those of `:rand`.

  alias StarweaveImage.Backoff

  # `patience`: what starts may still cost before callers are told that it is down; spent while nothing was ever ready.
  # `failures`: ends in a row, for the pause before the next start. `ready?`: whether the present process got ready.
  # `words`: what that process says is wrong with it. `sentence`: why it is condemned, and `stalled?` whether for hanging.
  # `logged`: the sentence with which the last start failed, which is no news a second time.
  @enforce_keys [:backoff]
  defstruct [
    :backoff,
    :words,
    :sentence,
    :logged,
    state: :resting,
    patience: 1,
    failures: 0,
    ready?: false,
    stalled?: false
  ]

  @typedoc """
  - `:resting`: there is no process, and the next start comes after a pause
  - `:started`: there is a process, and nothing was heard of it
  - `:greeted`: it has spoken and was told its configuration; it may be busy with imports
  - `:ready`: it takes work
  - `:condemned`: it is to be killed and is not listened to; it is still there where even the kill was not possible
  """
  @type state :: :resting | :started | :greeted | :ready | :condemned

  @typedoc """
  What happens: a process was started; it sent a heartbeat; it said `ready`, or what is wrong with it; it is found to
  hang (`:stalls`) or to break the protocol (`:fails`); there is no process any more, or none could be started, killed
  from outside or otherwise; it has been ready for long enough to be called stable.
  """
  @type event ::
          :started
          | :heartbeat
          | {:ready, term}
          | {:complaint, sentence :: String.t()}
          | {:stalls, sentence :: String.t()}
          | {:fails, sentence :: String.t()}
          | {:ended, sentence :: String.t(), :killed | :otherwise}
          | :stable

  @typedoc """
  What is to be done: send it its configuration; tell that it is ready; log its complaint; kill it; or close what is
  left of it, tell that it has ended, and start the next one after a pause in ms. `news?` says whether the log should
  show the sentence.
  """
  @type action ::
          :greet
          | {:announce, term}
          | {:complain, String.t(), news? :: boolean}
          | :kill
          | {:rest, String.t(), pause_ms :: non_neg_integer, news? :: boolean}

  @type t :: %__MODULE__{}

  # What starts may cost, once a sidecar has worked, before the accepted requests fail; what each failed start costs,
  # and one that somebody else killed, which says little of whether a start can succeed.
  @patience 9
  @failed 3
  @killed 1

  @doc "A life before its first start. The pauses between starts are from `first` to `most` ms."
  @spec new({first :: pos_integer, most :: pos_integer}) :: t
  def new(backoff), do: %__MODULE__{backoff: backoff}

  @doc """
  What an event makes of a life, and what is to be done. An event that means nothing in a state changes nothing.
  """
  @spec next(t, event) :: {[action], t}
  def next(%{state: :resting} = life, :started),
    do: {[], %{life | state: :started, ready?: false, words: nil, sentence: nil, stalled?: false}}

  def next(%{state: :started} = life, :heartbeat), do: {[:greet], %{life | state: :greeted}}

  def next(%{state: state} = life, {:ready, message}) when state in [:started, :greeted, :ready],
    do:
      {[{:announce, message}],
       %{life | state: :ready, ready?: true, patience: @patience, logged: nil}}

  # Before `ready`, this is why it cannot start.
  def next(%{state: state} = life, {:complaint, words}) when state in [:started, :greeted],
    do: {[{:complain, words, news?(life, words)}], %{life | words: words}}

  def next(%{state: :ready} = life, {:complaint, words}), do: {[{:complain, words, true}], life}

  def next(%{state: state} = life, {judgement, sentence})
      when state in [:started, :greeted, :ready] and judgement in [:stalls, :fails],
      do:
        {[:kill], %{life | state: :condemned, sentence: sentence, stalled?: judgement == :stalls}}

  def next(life, {:ended, sentence, how}), do: ended(life, sentence, how)

  def next(%{state: :ready} = life, :stable), do: {[], %{life | failures: 0}}
  def next(life, _meaningless), do: {[], life}

  # The pause is none after the first end of a process that had worked, and grows with each further end.
  defp ended(%{ready?: true} = life, sentence, _how) do
    sentence = life.sentence || sentence
    pause = Backoff.pause(life.failures, life.backoff)
    {[{:rest, sentence, pause, true}], rest(life, logged: nil)}
  end

  defp ended(life, sentence, how) do
    cost =
      if how == :killed and {life.sentence, life.words} == {nil, nil}, do: @killed, else: @failed

    sentence = life.sentence || life.words || sentence
    pause = Backoff.pause(life.failures + 1, life.backoff)
    patience = max(life.patience - cost, 0)

    {[{:rest, sentence, pause, news?(life, sentence)}],
     rest(life, logged: sentence, patience: patience)}
  end

  defp rest(life, fields) do
    struct!(
      %{life | state: :resting, ready?: false, words: nil, sentence: nil, stalled?: false},
      [failures: life.failures + 1] ++ fields
    )
  end

  @doc "Whether the log does not have the sentence yet as the reason for which starts fail."
  @spec news?(t, String.t()) :: boolean
  def news?(life, sentence), do: life.logged != sentence

  @doc "What is told of it. Once down, it is down until it is ready: callers get their answer at once meanwhile."
  @spec phase(t) :: :starting | :ready | :stalled | :down
  def phase(%{stalled?: true}), do: :stalled
  def phase(%{ready?: true}), do: :ready
  def phase(%{patience: 0}), do: :down
  def phase(_life), do: :starting
end
